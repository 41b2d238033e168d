"""Intake: what a client may send, and the one clear line for everything else. Nothing but InputError ever comes out."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import InputError, MessageError, UnknownError
from bmoe.protocol.messages import ModelRelease, Release
from coordinator.catalogue import Catalogue
from coordinator.intake import DATATYPES, take_in
from coordinator.jobs import Request

COMMON: dict[str, Any] = {"ledger": bytes(16), "epoch": 1, "author": "registrar", "seq": 1}
Spec = tuple[str, str, tuple[int, ...]]


def _model(*inputs: Spec, batch: bool = True) -> ReleasedModel:
    release = Release(
        **COMMON, model="toy", expert_name="a", digest=bytes(32), size=1, opset=17, memory_mb=1, batch=batch,
        inputs=inputs, outputs=(("y", "float32", (0, 1), struct.pack(">d", 0)),), owner="ada", issued_ms=1,
    )  # fmt: skip
    statement = ModelRelease(
        **COMMON, model="toy", version=3, manifest=bytes(32), gate=b"", experts=(release.digest,), top_k=1,
        combine="weighted_sum", cacheable=False, issued_ms=1,
    )  # fmt: skip
    return ReleasedModel(statement, None, (release,))


TOY = _model(("x", "float32", (0, 2)))
GOOD: dict[str, Any] = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 4e3]}


def _take(body: Any, model: ReleasedModel = TOY) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return take_in(raw, model, "public", "referee", 8, clock=lambda: 1234)


def _one(model: ReleasedModel = TOY, **changes: Any) -> Request:
    return _take({"inputs": [{**GOOD, **changes}]}, model)


def test_a_good_request_is_taken_with_its_defaults() -> None:
    request = _take({"inputs": [GOOD], "id": "mine", "unknown": 1})
    assert (request.rows, request.policy, request.wait, request.client_id) == (2, "referee", "decided", "mine")
    assert (request.tenant, request.received_ms, request.outputs, len(request.id)) == ("public", 1234, ("y",), 16)
    assert request.tensors[0].data == struct.pack("<4f", 1, 2.5, -3, 4e3)
    chosen = _take({"inputs": [GOOD], "parameters": {"policy": "full", "wait": "final"}, "outputs": [{"name": "y"}]})
    assert (chosen.policy, chosen.wait) == ("full", "final")


def test_flat_and_nested_data_are_the_same() -> None:
    assert _one(data=[[1, 2.5], [-3, 4e3]]).tensors == _one().tensors


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"inputs": [NaN]}', "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "must be a JSON object"),
        ({}, "inputs must be a list of objects"),
        ({"inputs": {}}, "inputs must be a list of objects"),
        ({"inputs": [1]}, "inputs must be a list of objects"),
        ({"inputs": []}, r"takes the inputs \['x'\], got \[\]"),
        ({"inputs": [{"name": "z"}]}, r"takes the inputs \['x'\], got \['z'\]"),
        ({"inputs": [{"name": ["x"]}]}, "takes the inputs"),
        ({"inputs": [{}]}, r"takes the inputs \['x'\], got \[None\]"),
        ({"inputs": [GOOD, GOOD]}, r"got \['x', 'x'\]"),
        ({"inputs": [GOOD], "id": 5}, "id must be text"),
        ({"inputs": [GOOD], "id": "x" * 129}, "at most 128"),
        ({"inputs": [GOOD], "parameters": None}, "parameters must be an object"),
        ({"inputs": [GOOD], "parameters": {"policy": "diagnosis"}}, "policy must be one of .*, got 'diagnosis'"),
        ({"inputs": [GOOD], "parameters": {"policy": ["full"]}}, "policy must be one of"),
        ({"inputs": [GOOD], "parameters": {"wait": None}}, "wait must be one of decided, committed, final, got None"),
        ({"inputs": [GOOD], "outputs": "y"}, "outputs must be a list of objects"),
        ({"inputs": [GOOD], "outputs": [{"name": "w"}]}, r"naming some of \['y'\]"),
        ({"inputs": [GOOD], "outputs": [{"name": ["y"]}]}, "outputs must be"),
    ],
)
def test_a_bad_body_is_one_clear_line(body: Any, words: str) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        _take(body)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"datatype": "FLOAT"}, "datatype must be one of BOOL, .*, got 'FLOAT'"),
        ({"datatype": ["FP32"]}, "datatype must be one of"),
        ({"datatype": None}, "got None"),
        ({"datatype": "FP64"}, r"expected 'x' float32\[2, 2\], found 'x' float64\[2, 2\]"),
        ({"shape": None}, "shape must be a list of integers, got None"),
        ({"shape": [2, "2"]}, "shape must be a list of integers"),
        ({"shape": [2, 2.0]}, "shape must be a list of integers"),
        ({"shape": [True, 4]}, "shape must be a list of integers"),
        ({"shape": [-2, -2]}, "0..2\\^31-1"),
        ({"shape": [1] * 9}, "at most 8 dims"),
        ({"shape": [2**40, 1]}, "0..2\\^31-1"),
        ({"shape": [2**31 - 1] * 8}, "items of data, got 4"),
        ({"shape": [2, 3]}, r"shape \[2, 3\] needs 6 items of data, got 4"),
        ({"shape": [4, 1]}, r"expected 'x' float32\[4, 2\], found 'x' float32\[4, 1\]"),
        ({"shape": [4]}, r"found 'x' float32\[4\]"),
        ({"shape": [], "data": [1]}, r"found 'x' float32\[\]"),
        ({"shape": [0, 2], "data": []}, "1..8 rows, this one 0"),
        ({"shape": [9, 2], "data": [0] * 18}, "1..8 rows, this one 9: split it"),
        ({"data": None}, "data must be a list, got null"),
        ({"data": 4}, "data must be a list, got an integer"),
        ({"data": "1234"}, "data must be a list, got text"),
        ({"data": {"0": 1}}, "data must be a list, got an object"),
        ({"data": [1, 2, 3, "4"]}, "FP32 takes numbers, found text"),
        ({"data": [1, 2, 3, None]}, "FP32 takes numbers, found null"),
        ({"data": [1, 2, 3, True]}, "FP32 takes numbers, found true or false"),
        ({"data": [1, 2, 3, {}]}, "FP32 takes numbers, found an object"),
        ({"data": [1, 2, 3, [4]]}, "FP32 takes numbers, found a list"),
        ({"data": [[1, 2], [3]]}, "nested data must be regular"),
        ({"data": [[1, 2], 3]}, "nested data must be regular"),
        ({"data": [[1], [2, 3, 4]]}, "nested data must be regular"),
        ({"data": [[1], [2], [3], [4]]}, r"nested as \[4, 1\], shape says \[2, 2\]"),
        ({"data": [[[1, 2], [3, 4]]]}, r"nested as \[1, 2, 2\]"),
        ({"data": [1, 2, 3, 1e39]}, "a number does not fit FP32"),
        ({"data": [1, 2, 3, -(2**200)]}, "a number does not fit FP32"),
    ],
)
def test_a_bad_input_is_named_with_what_was_expected_and_what_came(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        _one(**changes)
    assert len(str(caught.value)) < 400


def _flat(datatype: str, data: list[Any]) -> bytes:
    model = _model(("x", DATATYPES[datatype], (0,)))
    return _one(model, datatype=datatype, shape=[len(data)], data=data).tensors[0].data


INTEGER_TYPES = [d for d in DATATYPES if "INT" in d]


@pytest.mark.parametrize("datatype", INTEGER_TYPES)
def test_integers_are_taken_to_their_very_limits_and_never_wrap_round(datatype: str) -> None:
    limits = np.iinfo(DATATYPES[datatype])
    little = np.dtype(DATATYPES[datatype]).newbyteorder("<")
    low, high = int(limits.min), int(limits.max)
    assert np.frombuffer(_flat(datatype, [low, 1, high]), little).tolist() == [low, 1, high]
    for wrong in (low - 1, high + 1, 2**70, -(2**70), 1.5, 2.0, True, "1"):
        with pytest.raises(MessageError, match=f"{datatype} takes"):
            _flat(datatype, [0, wrong])


def test_bool_takes_true_and_false_alone() -> None:
    assert _flat("BOOL", [True, False, True]) == b"\x01\x00\x01"
    for wrong in (0, 1, 1.0, "true", None):
        with pytest.raises(MessageError, match="BOOL takes true or false"):
            _flat("BOOL", [True, wrong])


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"1e999999999"])
def test_json_cannot_smuggle_in_what_is_not_finite(number: bytes) -> None:
    body = json.dumps({"inputs": [{**GOOD, "data": [0, 0, 0, 12345]}]}).encode().replace(b"12345", number)
    with pytest.raises(MessageError):
        _take(body)


def test_one_long_text_among_many_numbers_costs_no_memory() -> None:
    """An array of text would hold 4 bytes a letter for every item: 60 kB of body would become 800 MB."""
    data = [*[0] * 20_000, "x" * 10_000]
    body = json.dumps({"inputs": [{**GOOD, "shape": [len(data) // 2, 2], "data": data}]}).encode()
    tracemalloc.start()
    with pytest.raises(MessageError):
        _take(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_an_error_never_repeats_a_megabyte_to_its_sender() -> None:
    big = "x" * 1_000_000
    bodies: list[dict[str, Any]] = [
        {"inputs": [{**GOOD, "datatype": big}]},
        {"inputs": [{"name": big}] * 3},
        {"inputs": [{**GOOD, "shape": [big]}]},
        {"inputs": [GOOD], "parameters": {"policy": [big] * 9}},
    ]
    for body in bodies:
        with pytest.raises(MessageError) as caught:
            _take(body)
        assert len(str(caught.value)) < 500


def test_a_model_without_a_batch_axis_has_one_row_and_scalars() -> None:
    model = _model(("x", "float32", ()), ("n", "int64", (3,)), batch=False)
    given = [{"name": "n", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]},
             {"name": "x", "shape": [], "datatype": "FP32", "data": [7]}]  # fmt: skip
    request = _take({"inputs": given}, model)
    assert request.rows == 1 and [t.name for t in request.tensors] == ["x", "n"], "in the model's order"


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
              st.sampled_from(["x", "FP32", "BOOL", "INT8"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*GOOD, "inputs"]), JSON, max_size=4), st.booleans(), JSON)
def test_any_json_is_taken_or_refused_and_nothing_else(changes: dict[str, Any], whole: bool, other: Any) -> None:
    body = changes if whole else {"inputs": [{**GOOD, **changes}], "parameters": other, "outputs": [other]}
    try:
        assert 1 <= _take(json.dumps(body).encode()).rows <= 8
    except InputError:
        pass


# --- the binary tensor data extension -------------------------------------------------------------------------------

ARRAYS = {"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4",
          "INT64": "<i8", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"}  # fmt: skip


def _binary(head: Any, *rest: bytes, model: ReleasedModel = TOY, length: int | None = None) -> Request:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return take_in(
        b"".join([raw, *rest]), model, "public", "referee", 8, head_bytes=len(raw) if length is None else length
    )


def _said(datatype: str, shape: list[int], size: Any, **more: Any) -> dict[str, Any]:
    return {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}, **more}


@settings(max_examples=50)
@given(st.sampled_from(sorted(ARRAYS)), st.integers(1, 8), st.integers(0, 5), st.data())
def test_every_datatype_is_taken_as_the_bytes_that_came(datatype: str, rows: int, width: int, data: Any) -> None:
    dtype = np.dtype(ARRAYS[datatype])
    raw = data.draw(st.binary(min_size=rows * width * dtype.itemsize, max_size=rows * width * dtype.itemsize))
    if datatype == "BOOL":
        raw = bytes(b & 1 for b in raw)
    model = _model(("x", dtype.newbyteorder("=").name, (0, width)))
    request = _binary({"inputs": [_said(datatype, [rows, width], len(raw))]}, raw, model=model)
    assert request.tensors[0].data == raw and request.rows == rows, "NaN too: it means a missing value to some models"


def test_json_and_binary_inputs_lie_side_by_side_in_any_order() -> None:
    model = _model(("a", "float32", (0,)), ("b", "int64", (0,)), ("c", "uint8", (0,)))
    inputs = [
        {**_said("UINT8", [1], 1), "name": "c"},
        {"name": "b", "shape": [1], "datatype": "INT64", "data": [7]},
        {**_said("FP32", [1], 4), "name": "a"},
    ]
    request = _binary({"inputs": inputs}, b"\x05", struct.pack("<f", 2.5), model=model)
    assert [t.data for t in request.tensors] == [struct.pack("<f", 2.5), struct.pack("<q", 7), b"\x05"]


def test_outputs_are_binary_where_they_or_the_request_say_so() -> None:
    model = _model(("x", "float32", (0, 2)))
    for head, binary in (
        ({}, set()),
        ({"parameters": {"binary_data_output": True}}, {"y"}),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, {"y"}),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": False}}],
          "parameters": {"binary_data_output": True}}, set()),
    ):  # fmt: skip
        request = _binary({"inputs": [_said("FP32", [1, 2], 8)], **head}, bytes(8), model=model)
        assert request.binary == binary


@pytest.mark.parametrize(
    ("given_input", "rest", "words"),
    [
        (_said("FP32", [1, 2], 8), bytes(7), "at most 7 here, got 8"),
        (_said("FP32", [1, 2], 8), bytes(9), "1 bytes follow"),
        (_said("FP32", [1, 2], 4), bytes(4), "needs 8 bytes, binary_data_size is 4"),
        (_said("FP32", [1, 2], -8), bytes(8), "binary_data_size must be"),
        (_said("FP32", [1, 2], 8.0), bytes(8), "binary_data_size must be"),
        (_said("FP32", [1, 2], True), bytes(8), "binary_data_size must be"),
        (_said("FP32", [1, 2], "8"), bytes(8), "binary_data_size must be"),
        (_said("FP32", [1, 2], 8, data=[1, 2]), bytes(8), "both data and binary_data_size"),
        (_said("BYTES", [1, 2], 8), bytes(8), "datatype must be one of .*, got 'BYTES'"),
        (_said("BF16", [1, 2], 4), bytes(4), "got 'BF16'"),
        (_said("FP32", [2**31 - 1] * 8, 8), bytes(8), "needs .* bytes"),
        ({"name": "x", "shape": [1, 2], "datatype": "FP16", "data": [1, 2]}, b"", "FP16 as binary data only"),
    ],
)
def test_bytes_that_are_not_what_the_head_says_are_refused(
    given_input: dict[str, Any], rest: bytes, words: str
) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        _binary({"inputs": [given_input]}, rest)
    assert len(str(caught.value)) < 400


def test_a_bool_is_a_byte_of_nought_or_one() -> None:
    with pytest.raises(MessageError, match="a BOOL is a byte of 0 or 1"):
        _binary({"inputs": [_said("BOOL", [1], 1)]}, b"\x02", model=_model(("x", "bool", (0,))))


@given(st.binary(max_size=80), st.integers(0, 100))
def test_any_bytes_and_any_length_of_head_are_refused_in_one_line(raw: bytes, length: int) -> None:
    with pytest.raises(MessageError) as caught:
        _binary(raw, length=length)
    assert "\n" not in str(caught.value)


@settings(max_examples=50)
@given(JSON, JSON, JSON, st.binary(max_size=16))
def test_any_head_before_any_bytes_is_taken_or_refused_and_nothing_else(
    size: Any, parameters: Any, output: Any, rest: bytes
) -> None:
    head = {"inputs": [_said("FP32", [1, 2], size)], "parameters": parameters, "outputs": [output]}
    try:
        request = _binary(head, rest)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert (size, request.tensors[0].data, request.rows) == (8, rest, 1)


@pytest.mark.parametrize(
    ("parameters", "policy"),
    [
        ({}, "referee"), ({"assurance": "verified"}, "referee"), ({"assurance": "unverified"}, "single"),
        ({"assurance": "verified", "policy": "full"}, "full"), ({"assurance": "verified", "policy": "single"}, None),
        ({"assurance": "certain"}, None), ({"assurance": 1}, None), ({"assurance": "unverified", "policy": "full"}, "full"),
    ],
)  # fmt: skip
def test_assurance_chooses_a_policy_and_never_less_than_it_says(parameters: dict[str, Any], policy: str | None) -> None:
    body = {"inputs": [GOOD], "parameters": parameters}
    if policy is None:
        with pytest.raises(MessageError, match=r"assurance"):
            _take(body)
    else:
        assert _take(body).policy == policy


def _state() -> State:
    state = State(bytes(16), 1, bytes(32))
    state.models["toy"], state.releases[bytes(32)] = TOY.statement, TOY.experts[0]
    return state


def test_the_catalogue_serves_what_is_released_now() -> None:
    state = _state()
    catalogue = Catalogue(state)
    assert catalogue.get("toy") == TOY and catalogue.names() == ["toy"]
    newer = _model(("x", "float16", (0, 2))).experts[0]
    state.releases[bytes(32)] = newer
    assert catalogue.get("toy").experts == (newer,), "an expert released anew is judged by its new tolerance at once"
    described = catalogue.metadata("toy")
    assert described["inputs"] == [{"name": "x", "datatype": "FP16", "shape": [-1, 2]}]
    with pytest.raises(UnknownError, match="'other' is not served here; there are: toy"):
        catalogue.get("other")
