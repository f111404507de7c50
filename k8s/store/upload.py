"""Copies files or folders into a bucket, which is made first: python k8s/store/upload.py PATH s3://BUCKET/KEY ...

For trying out; `aws s3 cp` does the same. It asks the store at AWS_ENDPOINT_URL_S3, with the key in AWS_ACCESS_KEY_ID
and AWS_SECRET_ACCESS_KEY.
"""

import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ConnectionError as NoConnection

SECONDS = 60
"""How long a store, or the port that leads to it, may take until it answers."""


def copy(store: Any, path: Path, uri: str) -> None:
    """Uploads ``path``; the files of a folder keep their names below it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if bucket not in {one["Name"] for one in store.list_buckets()["Buckets"]}:
        store.create_bucket(Bucket=bucket)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            store.upload_file(str(file), bucket, f"{key}/{file.relative_to(path).as_posix()}" if path.is_dir() else key)
    print(f"{path} -> {uri}")


def connected() -> Any:
    """The store, once it answers."""
    store = boto3.client("s3", region_name="us-east-1", config=Config(s3={"addressing_style": "path"}))
    end = time.monotonic() + SECONDS
    while True:
        try:
            store.list_buckets()
            return store
        except NoConnection as error:
            if time.monotonic() > end:
                sys.exit(f"{error}: no store answers; is kubectl port-forward running?")
            time.sleep(0.5)


def main(words: list[str]) -> None:
    """Copies every PATH to the URI behind it."""
    if not words or len(words) % 2:
        sys.exit(__doc__)
    absent = [path for path in words[::2] if not Path(path).exists()]
    if absent:
        sys.exit(f"no such file or folder: {', '.join(absent)}")
    store = connected()
    for path, uri in zip(words[::2], words[1::2], strict=True):
        copy(store, Path(path), uri)


if __name__ == "__main__":
    main(sys.argv[1:])
