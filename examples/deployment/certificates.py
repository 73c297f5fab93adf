"""Certificates and keys for a federation: a certificate authority, the SuperLink's certificate, a key pair
for each SuperNode.

    python certificates.py DIR --host superlink.example.org --nodes hospital-a hospital-b

writes DIR/ca.crt (for everybody), DIR/ca.key (keep it offline), DIR/server.pem and DIR/server.key (for the
SuperLink), and DIR/NODE and DIR/NODE.pub for each node; files that are there already stay. Each organisation
can as well make its own key, `ssh-keygen -t ecdsa -b 384 -N "" -f NODE`, and send NODE.pub alone.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()
AUTHORITY = "fedhl federation"


def write_private(path: Path, content: bytes) -> None:
    """A file that only its owner can read, from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)


def new_key(path: Path, form: serialization.PrivateFormat) -> ec.EllipticCurvePrivateKey:
    """A new P-384 key, in a file."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key.private_bytes(PEM, form, PLAIN))
    return key


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def certificate(
    subject: str, key: ec.EllipticCurvePublicKey, issuer: str, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def make_authority(folder: Path, days: int) -> None:
    """`ca.key` and `ca.crt`."""
    key = new_key(folder / "ca.key", serialization.PrivateFormat.PKCS8)
    usage = x509.KeyUsage(
        **dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            False,
        ),
        **dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False),
        key_cert_sign=True,
        crl_sign=True,
    )
    builder = certificate(AUTHORITY, key.public_key(), AUTHORITY, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())
    (folder / "ca.crt").write_bytes(made.public_bytes(PEM))


def make_server(folder: Path, hosts: Sequence[str], days: int) -> None:
    """`server.key` and `server.pem`, valid for these host names and addresses."""
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = new_key(folder / "server.key", serialization.PrivateFormat.PKCS8)
    names = x509.SubjectAlternativeName([alternative(host) for host in hosts])
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = (
        certificate(hosts[0], key.public_key(), AUTHORITY, days)
        .add_extension(names, critical=False)
        .add_extension(issued_by, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, hashes.SHA384())
    )
    (folder / "server.pem").write_bytes(made.public_bytes(PEM))


def alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_node(folder: Path, node: str) -> None:
    """`NODE` and `NODE.pub`, as ssh-keygen writes them."""
    key = new_key(folder / node, serialization.PrivateFormat.OpenSSH)
    form = serialization.PublicFormat.OpenSSH
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, form)
    (folder / f"{node}.pub").write_bytes(public + b"\n")


def make(folder: Path, hosts: Sequence[str], nodes: Sequence[str], days: int = 365) -> None:
    """All that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ca.crt").exists():
        make_authority(folder, 10 * days)
    if not (folder / "server.pem").exists():
        make_server(folder, hosts, days)
    for node in nodes:
        if not (folder / node).exists():
            make_node(folder, node)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        help="name or address of the SuperLink; repeatable",
    )
    parser.add_argument(
        "--nodes", nargs="*", default=[], help="names of the nodes to make keys for"
    )
    parser.add_argument("--days", type=int, default=365, help="how long the certificate is valid")
    given = parser.parse_args()
    make(given.folder, given.host, given.nodes, given.days)


if __name__ == "__main__":
    main()
