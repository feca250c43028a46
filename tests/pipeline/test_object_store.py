"""An object store that lets us read and not write: one sentence, nothing half-written, and on."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from toy import toy_build, toy_order, toy_recipe, toy_rows, write_pictures, write_rows

from pmd_pipeline.contract.manifest import load_manifest

pytestmark = pytest.mark.slow

READ_ONLY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}],
}
EVERYTHING = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}


@pytest.fixture
def store():
    """A store with a bucket; who asks must be allowed to."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def client(service: str, store: str, **keys: str):
    keys = keys or {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
    return boto3.client(service, endpoint_url=store, region_name="us-east-1", **keys)


def user(store: str, name: str, policy: object) -> dict[str, str]:
    """The environment of a user who may do what the policy says."""
    iam = client("iam", store)
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {
        **os.environ,
        "AWS_ENDPOINT_URL": store,
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def check_from_now_on(store: str) -> None:
    """Let the store check who may do what, which it does not do from the start."""
    asked = urllib.request.Request(  # noqa: S310 - ours
        f"{store}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
    )
    urllib.request.urlopen(asked).close()  # noqa: S310 - likewise


def build(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    recipe = folder / "toy.toml"
    recipe.write_text('source = "cc3m"\npart_records = 25\n')
    command = [
        *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", str(recipe)),
        *("--raw", str(folder / "raw"), "--images", str(folder / "pictures")),
        *("--out", "s3://bucket/data", "--manifests", str(folder / "manifests")),
        *("--runner", "local", "--workers", "1", "--quiet"),
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_a_store_that_cannot_be_written_is_one_sentence_and_mended_the_build_goes_on(
    store, tmp_path
):
    write_rows(tmp_path / "raw", toy_rows(60))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(60)])
    there = toy_order(tmp_path / "other", toy_recipe(part_records=25), pictures=pictures)
    write_rows(tmp_path / "other" / "raw", toy_rows(60))
    undisturbed = toy_build(there)
    client("s3", store).create_bucket(Bucket="bucket")
    reader, writer = user(store, "reader", READ_ONLY), user(store, "writer", EVERYTHING)
    check_from_now_on(store)

    refused = build(tmp_path, reader)
    keys = {
        "aws_access_key_id": writer["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": writer["AWS_SECRET_ACCESS_KEY"],
    }
    left = client("s3", store, **keys).list_objects_v2(Bucket="bucket")["KeyCount"]
    mended = build(tmp_path, writer)

    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "cannot write s3://bucket/data" in refused.stderr
    assert left == 0
    assert mended.returncode == 0, mended.stderr
    manifest = load_manifest(str(tmp_path / "manifests" / "cc3m.json"))
    assert manifest.digest == undisturbed.digest
