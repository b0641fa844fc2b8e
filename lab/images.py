"""Container images built on the spot from this machine's Debian packages (`recipes.py`): nothing is pulled.

The OCI archives are kept under .build/images by what they were made of, so that a second run only looks the files up.
"""

import fcntl
import hashlib
import io
import json
import platform
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lab import LabError, image_name
from lab.layers import Layer, Recipe
from lab.recipes import CACHE, RECIPES

# Raised when the archives themselves are made differently: the files that go in don't show it.
_FORMAT = 1
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def build(name: str) -> Path:
    """The OCI archive of the image, built if what it is made of has changed. Raises LabError."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise LabError(f"There is no recipe for the image {name}", f"there are {', '.join(RECIPES)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    # Several labs may start at once from the same checkout.
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        layers = recipe.layers()
        made_of = "\n".join([str(_FORMAT), json.dumps(recipe.config()), *(f for x in layers for f in x.fingerprints())])
        archive = CACHE / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.tar"
        if not archive.exists():
            unfinished = archive.with_suffix(".unfinished")
            with unfinished.open("wb") as out:
                _write_archive(out, image_name(name), recipe, layers)
            for old in CACHE.glob(f"{name}-{'?' * 16}.tar"):
                old.unlink()
            unfinished.rename(archive)
        return archive


def _write_archive(out: BinaryIO, reference: str, recipe: Recipe, layers: Sequence[Layer]) -> None:
    with tarfile.open(fileobj=out, mode="w") as archive:

        def blob(content: BinaryIO, media_type: str) -> dict[str, object]:
            digest = hashlib.sha256()
            while piece := content.read(1 << 20):
                digest.update(piece)
            info = tarfile.TarInfo(f"blobs/sha256/{digest.hexdigest()}")
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)
            return {"mediaType": media_type, "digest": f"sha256:{digest.hexdigest()}", "size": info.size}

        def document(content: object, kind: str) -> dict[str, object]:
            return blob(io.BytesIO(json.dumps(content).encode()), f"application/vnd.oci.image.{kind}.v1+json")

        descriptors = []
        for layer in layers:
            with tempfile.TemporaryFile(dir=CACHE) as content:
                layer.write(content)
                content.seek(0)
                descriptors.append(blob(content, "application/vnd.oci.image.layer.v1.tar"))
        config = document(
            {
                "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": recipe.config(),
                "rootfs": {"type": "layers", "diff_ids": [d["digest"] for d in descriptors]},
            },
            "config",
        )
        manifest = document({"schemaVersion": 2, "config": config, "layers": descriptors}, "manifest")
        # containerd names the imported image by this annotation.
        manifest["annotations"] = {"io.containerd.image.name": reference}
        index: dict[str, object] = {"schemaVersion": 2, "manifests": [manifest]}
        for path, document_ in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
            data = json.dumps(document_).encode()
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
