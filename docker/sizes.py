"""Prints what an image's archive weighs: its layers and its largest packages. ``python docker/sizes.py ARCHIVE``."""

import collections
import json
import re
import sys
import tarfile
from pathlib import Path

MIB = 1 << 20
_PACKAGE = re.compile(r"(?:\./)?opt/tunejob/lib/python3\.\d+/site-packages/([^/]+)")


def main() -> None:
    """Layers as they lie in the archive (uncompressed), then the ten largest packages."""
    archive = Path(sys.argv[1])
    packages: collections.Counter[str] = collections.Counter()
    with tarfile.open(archive) as image:
        manifest = json.load(image.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
        layers = [image.getmember(name) for name in manifest["Layers"]]
        print(f"{manifest['RepoTags'][0]}: {sum(layer.size for layer in layers) / MIB:,.0f} MiB, uncompressed")
        for layer in layers:
            member = image.extractfile(layer)
            with tarfile.open(fileobj=member) as content:
                entries = [(entry.name, entry.size) for entry in content if entry.isfile()]
            largest = max(entries, key=lambda entry: entry[1], default=("nothing", 0))[0]
            print(f"  layer {layer.size / MIB:8,.0f} MiB  {len(entries):6} files  largest: {largest}")
            for name, size in entries:
                found = _PACKAGE.match(name)
                packages[found[1] if found else "(system)"] += size
    for name, size in packages.most_common(10):
        print(f"  {size / MIB:8,.0f} MiB  {name}")


if __name__ == "__main__":
    main()
