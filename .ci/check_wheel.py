"""Looks into a wheel and the sdist it was built from: `check_wheel.py WHEEL SDIST`."""

import csv
import hashlib
import io
import re
import sys
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from email.parser import BytesParser
from pathlib import PurePosixPath

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

LICENCES = {"LICENSE", "licenses/nanobind.txt", "licenses/robin-map.txt"}
SUFFIXES = {".py", ".pyi", ".typed", ".so", ".cubin", ".json"}
INSTALLED, PACKED = 10 << 20, 4 << 20  # bytes that a wheel may have


def check_wheel(path: str) -> None:
    wheel = zipfile.ZipFile(path)
    names = [n for n in wheel.namelist() if not n.endswith("/")]
    (info,) = {n.split("/")[0] for n in names if ".dist-info/" in n}

    strangers = [n for n in names if n.split("/")[0] not in ("jaxfp8", info)]
    strangers += [
        n for n in names if n.startswith("jaxfp8/") and PurePosixPath(n).suffix not in SUFFIXES
    ]
    assert not strangers, f"not the package's: {strangers}"
    assert len([n for n in names if n.endswith(".so")]) == 1, "exactly one extension module"
    images = [n for n in names if n.startswith("jaxfp8/_cuda/")]
    assert images and all(n.endswith(".cubin") for n in images), images
    installed = sum(i.file_size for i in wheel.infolist())
    packed = sum(i.compress_size for i in wheel.infolist())
    assert installed <= INSTALLED and packed <= PACKED, (installed, packed)

    record = csv.reader(io.TextIOWrapper(wheel.open(f"{info}/RECORD")))
    recorded = {name: digest for name, digest, _ in record}
    assert set(recorded) == set(names), set(recorded) ^ set(names)
    for name, digest in recorded.items():
        if digest:
            got = urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).rstrip(b"=")
            assert digest == f"sha256={got.decode()}", name

    metadata = BytesParser().parsebytes(wheel.read(f"{info}/METADATA"))
    assert set(metadata.get_all("License-File")) == LICENCES
    for licence in LICENCES:
        assert wheel.read(f"{info}/licenses/{licence}"), licence
    bills = [n for n in names if n.startswith(f"{info}/sboms/") and n.endswith(".cdx.json")]
    ours = wheel.read(f"{info}/sboms/jaxfp8.cdx.json").decode()
    for bill in bills:
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(wheel.read(bill).decode())
        assert error is None, f"{bill}: {error}"
    assert f'"version": "{metadata["Version"]}"' in ours
    # Shared libraries that auditwheel put beside the module would be carried, and missing from the bill.
    assert not any(n.split("/")[0].endswith(".libs") for n in names)
    print(
        f"{path}: {packed / 2**20:.1f} MiB, {installed / 2**20:.1f} installed, {len(names)} files, "
        f"{len(images)} kernel images, {len(bills)} bill of materials"
    )


def check_sdist(path: str) -> None:
    names = [n.split("/", 1)[1] for n in tarfile.open(path).getnames() if "/" in n]
    built = [n for n in names if re.search(r"\.(so|cubin|ptx|o|pyc|whl)$|^build/|/_cuda/", n)]
    assert not built, f"build products in the sdist: {built}"
    needed = {"pyproject.toml", "CMakeLists.txt", "build_backend/jaxfp8_build.py", *LICENCES}
    assert needed <= set(names), needed - set(names)
    print(f"{path}: {len(names)} files, no build product")


if __name__ == "__main__":
    check_wheel(sys.argv[1])
    check_sdist(sys.argv[2])
