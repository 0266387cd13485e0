"""Certificates for tests, made by openssl: an authority, a server of its, and another authority."""

import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """PEM files; `elsewhere` is of the same authority and key as `cert`, for another host name."""

    ca: Path
    cert: Path
    key: Path
    other_ca: Path
    elsewhere: Path


def made_certificates(directory: Path) -> Certificates:
    """All of them, new, in `directory`."""
    for authority in ("ca", "other"):
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={authority}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", f"{authority}.key", "-out", f"{authority}.pem"),
            cwd=directory,
        )
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr"),
        cwd=directory,
    )
    for name, hosts in (("server", "IP:127.0.0.1,DNS:localhost"), ("elsewhere", "DNS:elsewhere.example")):
        (directory / "names").write_text(f"subjectAltName={hosts}\n")
        _openssl(
            *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "names", "-out", f"{name}.pem"),
            cwd=directory,
        )
    return Certificates(
        ca=directory / "ca.pem",
        cert=directory / "server.pem",
        key=directory / "server.key",
        other_ca=directory / "other.pem",
        elsewhere=directory / "elsewhere.pem",
    )


def _openssl(*words: str, cwd: Path) -> None:
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)
