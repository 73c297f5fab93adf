"""How answers of language models are scored in experiments: ROUGE-L, and programs in a sandbox."""

from __future__ import annotations

import pytest
import scoring

SQUARE = {
    "prompt": "def square(x):\n",
    "test": "def check(f):\n    assert f(3) == 9 and f(-2) == 4\n",
    "entry_point": "square",
}


def test_rouge_l_of_sentences_whose_subsequence_one_can_see():
    def score(answer: str) -> float:
        return scoring.rouge_l({"completion": "the cat sat on the mat"}, [answer])["rougeL"]

    assert score("The cat sat on the mat.") == 1
    assert score("a dog") == score("") == 0
    # "the cat on mat": 4 of 6 words on either side
    assert score("The cat was on a mat!") == pytest.approx(2 / 3)
    # order counts: "the" and one of "mat", "cat": 2 of 3, and 2 of 6
    assert score("mat the cat") == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))


@pytest.mark.parametrize(
    ("body", "right"),
    [("    return x * x\n", 1), ("    return 9\n", 0), ("    return x *\n", 0)],
)
def test_a_function_passes_by_its_test(body: str, right: int):
    assert scoring.pass_at_1(SQUARE, [body]) == {"pass@1": right}


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",  # ends, but not at its end
        "import os; os._exit(0)",
        "open('/etc/passwd')",
        "import os; assert os.listdir('/') != []",
        "f = open('/x', 'wb', 0); f.write(b'1')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
        "bytearray(2 << 30)",
        "import _socket; _socket.socket().connect(('127.0.0.1', 80))",
    ],
)
def test_a_program_can_do_nothing_but_compute(program: str):
    assert not scoring.passes(program)


def test_a_program_that_only_computes_comes_to_its_end():
    assert scoring.passes("from math import sqrt\nfrom typing import List\nprint(sqrt(4))")
