"""An unmodified tritonclient asks the fleet: metadata, JSON and binary inference, and what it is told when it is wrong."""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
import pytest
from live_fleet import LiveFleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

# In a process of its own: it runs on gevent, and sends no Content-Type with its binary bodies.
ASK = """
import json, sys
import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

client = InferenceServerClient(sys.argv[1], concurrency=2)
windows = np.load(sys.argv[2])
told = {
    "live": client.is_server_live(), "ready": client.is_server_ready(), "model": client.is_model_ready("wearable"),
    "version": client.is_model_ready("wearable", "1"), "absent": client.is_model_ready("nothing"),
    "server": client.get_server_metadata(), "metadata": client.get_model_metadata("wearable", "1"),
}

def given(binary, **changes):
    tensor = InferInput("window", list(windows.shape), changes.get("datatype", "FP32"))
    tensor.set_data_from_numpy(windows, binary_data=binary)
    return [tensor]

def said(result):
    return result.as_numpy("probabilities").tolist(), result.get_response()["parameters"]["verdicts"]

def refused(**options):
    try:
        client.infer(**options)
    except InferenceServerException as error:
        return [error.status(), error.message()]

for name, binary in (("json", False), ("binary", True)):
    wanted = [InferRequestedOutput("probabilities", binary_data=binary)]
    told[name] = said(client.infer("wearable", given(binary), outputs=wanted, request_id="mine"))
    told[name + "_default"] = said(client.infer("wearable", given(binary)))
for algorithm in ("gzip", "deflate"):
    packed = client.infer("wearable", given(True), request_compression_algorithm=algorithm)
    told[algorithm] = said(packed)
told["async"] = said(client.async_infer("wearable", given(True)).get_result())
told["unknown"] = refused(model_name="nothing", inputs=given(True))
told["wanted"] = refused(model_name="wearable", inputs=given(True), outputs=[InferRequestedOutput("nothing")])
print(json.dumps(told))
"""


async def test_tritonclient_gets_metadata_answers_in_both_forms_and_clear_refusals(fleet: LiveFleet, tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.save(tmp_path / "windows.npy", fleet.windows[:3])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ASK, fleet.fleet.url.removeprefix("http://"), str(tmp_path / "windows.npy"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    told = json.loads(out)
    assert told["live"] and told["ready"] and told["model"] and told["version"] and not told["absent"]
    assert told["server"]["name"] == "bmoe" and "binary_tensor_data" in told["server"]["extensions"]
    assert told["metadata"]["inputs"] == [{"name": "window", "datatype": "FP32", "shape": [-1, 6, 100]}]
    for form in ("json", "binary", "json_default", "binary_default", "gzip", "deflate", "async"):
        values, verdicts = told[form]
        np.testing.assert_allclose(np.array(values), fleet.truth[:3], atol=1e-3)
        assert verdicts
    assert told["unknown"][0] == "404" and "'nothing' is not served here" in told["unknown"][1]
    assert told["wanted"][0] == "400" and "probabilities" in told["wanted"][1]
