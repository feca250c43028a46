"""An object store without write access: one error line, no partial files, and resuming."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

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
    """An S3 server; access is checked after `enforce_policies`."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def client(service: str, store: str, **keys: str):
    keys = keys or {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
    return boto3.client(service, endpoint_url=store, region_name="us-east-1", **keys)


def user(store: str, name: str, policy: object) -> dict[str, str]:
    """The environment of a user with this policy."""
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


def enforce_policies(store: str) -> None:
    """Let the store enforce policies, which it does not do at first."""
    request = urllib.request.Request(  # noqa: S310 - the server above
        f"{store}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
    )
    urllib.request.urlopen(request).close()  # noqa: S310 - likewise


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


def test_a_store_without_write_access_is_one_error_line_and_the_build_resumes_with_it(
    store, tmp_path
):
    write_rows(tmp_path / "raw", toy_rows(60))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(60)])
    local_build = toy_source_build(
        tmp_path / "other", toy_recipe(part_records=25), pictures=pictures
    )
    write_rows(tmp_path / "other" / "raw", toy_rows(60))
    undisturbed = toy_build(local_build)
    client("s3", store).create_bucket(Bucket="bucket")
    reader, writer = user(store, "reader", READ_ONLY), user(store, "writer", EVERYTHING)
    enforce_policies(store)

    refused = build(tmp_path, reader)
    keys = {
        "aws_access_key_id": writer["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": writer["AWS_SECRET_ACCESS_KEY"],
    }
    num_keys = client("s3", store, **keys).list_objects_v2(Bucket="bucket")["KeyCount"]
    resumed = build(tmp_path, writer)

    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "cannot write s3://bucket/data" in refused.stderr
    assert num_keys == 0
    assert resumed.returncode == 0, resumed.stderr
    manifest = load_manifest(str(tmp_path / "manifests" / "cc3m.json"))
    assert manifest.digest == undisturbed.digest
