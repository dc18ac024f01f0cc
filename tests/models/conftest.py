"""What tests of models' files share, unless a module has its own: an object store, a tiny DiT's weights."""

from pathlib import Path

import boto3
import pytest
from fetching import BUCKET, SECRET
from moto.server import ThreadedMotoServer
from torch import Tensor

from harmonica.models.dit.model import DiT


@pytest.fixture(scope="module")
def s3_endpoint():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch, tmp_path):
    """A client, with its bucket empty and a cache of our own."""
    monkeypatch.setenv("HARMONICA_CACHE", str(tmp_path / "cache"))
    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{s3_endpoint}", **keys)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])


@pytest.fixture
def uri(s3_endpoint):
    """The URI of a key, with the credentials in it as pyarrow takes them."""

    def make(key: str) -> str:
        secret = SECRET.replace("+", "%2B").replace("/", "%2F")
        where = f"scheme=http&endpoint_override={s3_endpoint}&region=us-east-1"
        return f"s3://id:{secret}@{BUCKET}/{key}?{where}"

    return make


@pytest.fixture
def state(tiny_dit: DiT) -> dict[str, Tensor]:
    return tiny_dit.float().state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dit.pt"
