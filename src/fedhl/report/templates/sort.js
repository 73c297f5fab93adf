// The headings of a sortable table are buttons: each sorts by data-v of its cells, the empty ones last.

for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((th, column) => {
    const button = th.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const body = table.tBodies[0], key = row => row.cells[column].dataset.v;
      const numeric = [...body.rows].every(row => !isNaN(key(row) ?? 0));
      const sorted = th.getAttribute("aria-sort");
      const up = sorted === "descending" || (!sorted && !numeric);
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const compare = (a, b) => numeric ? key(a) - key(b) : key(a).localeCompare(key(b));
      const filled = [], empty = [];
      for (const row of body.rows) (key(row) === undefined ? empty : filled).push(row);
      filled.sort((a, b) => up ? compare(a, b) : compare(b, a));
      body.append(...filled, ...empty);
    });
  });
