"""launch/kubernetes.yaml says the same thing everywhere; there is no cluster here to run it on."""

from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from ummim.recipe_file import load_recipe


@pytest.fixture(scope="module")
def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    return service, job


def test_the_pods_find_the_first_of_them(manifest: tuple[dict[str, Any], dict[str, Any]]):
    service, job = manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    host, _, port = variables["RDZV_ENDPOINT"].rpartition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert port.isdigit()
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["NPROC_PER_NODE"]


def test_a_pod_has_time_to_save_and_its_143_is_no_failure(manifest: tuple[dict[str, Any], dict[str, Any]]):
    _, job = manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] > int(variables["SAVE_SECONDS"])
    ignored = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert ignored == [{"containerName": container["name"], "operator": "In", "values": [143]}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_it_starts_a_script_of_ours_with_a_recipe_that_loads(manifest: tuple[dict[str, Any], dict[str, Any]]):
    _, job = manifest
    script, recipe, *overrides = job["spec"]["template"]["spec"]["containers"][0]["command"]
    text = (ROOT / script).read_text()
    load_recipe(recipe, overrides)
    for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]:
        assert f"{{{entry['name']}:-" in text, entry
