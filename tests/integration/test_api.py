"""The HTTP API as a client of the Open Inference Protocol v2 meets it, on a real fleet; and what bad bodies get."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from live_fleet import LiveFleet

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.errors import InputError
from bmoe.protocol.messages import Promise, open_message
from bmoe.protocol.tensors import Tensor

pytestmark = pytest.mark.asyncio(loop_scope="session")


def body(windows: np.ndarray, **more: Any) -> dict[str, Any]:
    """An infer body for the built-in model."""
    data = {"name": "window", "shape": list(windows.shape), "datatype": "FP32", "data": windows.ravel().tolist()}
    return {"inputs": [data], **more}


async def call(fleet: LiveFleet, method: str, path: str, **options: Any) -> httpx.Response:
    """One call of the gateway's API."""
    async with httpx.AsyncClient(base_url=fleet.fleet.url, timeout=60) as client:
        return await client.request(method, path, **options)


async def test_health_server_and_model_metadata_are_as_the_protocol_has_them(fleet: LiveFleet) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/wearable/ready"):
        assert (await call(fleet, "GET", path)).status_code == 200
    server = (await call(fleet, "GET", "/v2")).json()
    assert server["name"] == "bmoe" and server["version"] and isinstance(server["extensions"], list)
    for path in ("/v2/models/wearable", "/v2/models/wearable/versions/1"):
        model = (await call(fleet, "GET", path)).json()
        assert model["name"] == "wearable" and model["versions"] == ["1"] and model["platform"]
        assert model["inputs"] == [{"name": "window", "datatype": "FP32", "shape": [-1, 6, 100]}]
        assert model["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 7]}]


async def test_an_answer_echoes_the_id_and_names_its_verdicts(fleet: LiveFleet) -> None:
    windows = fleet.windows[:3]
    reply = await call(fleet, "POST", "/v2/models/wearable/infer", json=body(windows, id="mine"))
    answer = reply.json()
    assert reply.status_code == 200 and answer["id"] == "mine" and answer["model_name"] == "wearable"
    (output,) = answer["outputs"]
    given = np.array(output["data"], np.float32).reshape(output["shape"])
    assert (output["name"], output["datatype"]) == ("probabilities", "FP32")
    np.testing.assert_allclose(given, fleet.truth[:3], atol=1e-3)
    assert answer["parameters"]["verdicts"] and answer["parameters"]["assurance"] == "verified"


async def test_the_promise_is_signed_binds_request_and_result_and_is_kept(fleet: LiveFleet) -> None:
    """The client holds the salts: it can check what was committed to, and that the ledger has it."""
    windows = fleet.windows[:2]
    answer = (await call(fleet, "POST", "/v2/models/wearable/infer", json=body(windows))).json()
    given = answer["parameters"]
    sealed = open_message(Promise, base64.b64decode(given["promise"]))
    facts = await fleet.unharmed()
    facts.state.verify(sealed)
    promise = sealed.header
    (output,) = answer["outputs"]
    result = Tensor("probabilities", "float32", (2, 7), np.array(output["data"], "<f4").tobytes())
    request = Tensor("window", "float32", (2, 6, 100), windows.astype("<f4").tobytes())
    assert promise.request.hex() == given["request"]
    assert promise.result_root == commit_rows("", bytes.fromhex(given["result_salt"]), [result], 2)
    assert promise.request_root == commit_rows("", bytes.fromhex(given["request_salt"]), [request], 2)
    entered = facts.answers[promise.request]
    assert (entered.result_root, entered.request_root) == (promise.result_root, promise.request_root)
    assert entered.time_ms <= promise.deadline_ms


@pytest.mark.parametrize("policy", ["referee", "quorum", "full", "single"])
async def test_every_policy_that_a_client_may_ask_for_answers_right_on_an_honest_fleet(
    fleet: LiveFleet, policy: str
) -> None:
    answer = await fleet.answers_right(policy)
    assert answer.assurance == ("unverified" if policy == "single" else "verified")
    facts = await fleet.unharmed()
    assert {facts.verdicts[bytes.fromhex(v)].policy for v in answer.verdicts} == {policy}


async def test_requests_that_come_together_share_tasks_and_each_gets_its_own_rows(fleet: LiveFleet) -> None:
    """Twelve requests at once: fewer tasks than choices, and no row is mixed up with another's."""

    async def one(index: int) -> tuple[int, dict[str, Any]]:
        reply = await call(fleet, "POST", "/v2/models/wearable/infer", json=body(fleet.windows[index : index + 1]))
        return index, reply.json()

    count = min(12, len(fleet.windows))
    answers = await asyncio.gather(*(one(i) for i in range(count)))
    for index, answer in answers:
        given = np.array(answer["outputs"][0]["data"], np.float32)
        np.testing.assert_allclose(given, fleet.truth[index], atol=1e-3)
    tasks = {verdict for _, answer in answers for verdict in answer["parameters"]["verdicts"]}
    assert len(tasks) < 2 * count


WINDOW = np.zeros((1, 6, 100), np.float32)
BAD: list[tuple[str, Callable[[], bytes], int, str]] = [
    ("not JSON", lambda: b"{", 400, "JSON"),
    ("an array", lambda: b"[]", 400, "object"),
    ("no inputs", lambda: b"{}", 400, "inputs"),
    ("another input", lambda: json.dumps(body(WINDOW)).replace("window", "door").encode(), 400, "window"),
    ("too few values", lambda: json.dumps(body(WINDOW)).replace("100]", "101]").encode(), 400, "shape"),
    ("another type", lambda: json.dumps(body(WINDOW)).replace("FP32", "INT8").encode(), 400, "FP32|float32|INT8"),
    ("text for numbers", lambda: json.dumps(body(WINDOW)).replace("0.0", '"a"', 1).encode(), 400, "window"),
    ("an unknown policy", lambda: json.dumps(body(WINDOW, parameters={"policy": "trust me"})).encode(), 400, "policy"),
    ("diagnosis for itself", lambda: json.dumps(body(WINDOW, parameters={"policy": "diagnosis"})).encode(), 400, "policy"),
    ("an unknown wait", lambda: json.dumps(body(WINDOW, parameters={"wait": "ever"})).encode(), 400, "wait"),
    ("too many rows", lambda: json.dumps(body(np.zeros((257, 6, 100), np.float32))).encode(), 400, "256"),
    ("no rows", lambda: json.dumps(body(np.zeros((0, 6, 100), np.float32))).encode(), 400, "rows"),
    ("too large", lambda: b" " * (16 * 1024 * 1024 + 1), 413, "at most 16777216 are taken"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "status", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_a_bad_body_gets_one_clear_line_and_the_next_request_an_answer(
    fleet: LiveFleet, content: Callable[[], bytes], status: int, says: str
) -> None:
    reply = await call(fleet, "POST", "/v2/models/wearable/infer", content=content())
    error = reply.json()["error"]
    assert reply.status_code == status and "\n" not in error and "Traceback" not in error
    assert any(word in error for word in says.split("|")), error
    assert (await call(fleet, "POST", "/v2/models/wearable/infer", json=body(WINDOW))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/wearable/versions/7", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/v2/models/wearable", 405),
        ("GET", "/v1/answers/xyz/receipt", 400),
        ("GET", f"/v1/answers/{'00' * 16}/receipt", 404),
        ("GET", f"/v1/verdicts/{'00' * 16}/receipt", 404),
    ],
)
async def test_what_is_not_there_is_said_in_json(fleet: LiveFleet, method: str, path: str, status: int) -> None:
    reply = await call(fleet, method, path)
    assert reply.status_code == status and reply.json()["error"]


async def test_the_python_client_passes_on_the_gateways_own_words(fleet: LiveFleet) -> None:
    with contextlib.closing(fleet.fleet.client()) as client:
        with pytest.raises(InputError, match="is not served here"):
            await asyncio.to_thread(client.metadata, "nobody")
        with pytest.raises(InputError, match="256"):
            windows = {"window": np.zeros((300, 6, 100), np.float32)}
            await asyncio.to_thread(client.infer, "wearable", windows)
