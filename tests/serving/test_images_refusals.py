"""Requests for images that are refused: the answer names the field, its value and the cure."""

import json

import pytest
from images_endpoint import PATH, refused

from pipelines.serving.images_api import MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "said"),
    [
        ({"prompt": "cat"}, 400, "prompt", "unknown_class", "'cat': give a class name (T-shirt/top, Trouser"),
        ({"prompt": "10"}, 400, "prompt", "unknown_class", "a number from 0 to 9"),
        ({"prompt": "-1"}, 400, "prompt", "unknown_class", "'-1'"),
        ({"prompt": "٣"}, 400, "prompt", "unknown_class", "'٣'"),
        ({"prompt": ""}, 400, "prompt", "invalid_value", "at least 1 character"),
        ({"prompt": "x" * 4097}, 400, "prompt", "invalid_value", "at most 4096 characters"),
        ({"prompt": 3}, 400, "prompt", "invalid_value", "prompt is 3: it should be a valid string"),
        ({"prompt": "\ud800"}, 400, None, "invalid_json", "the body is not JSON"),
        (
            {"prompt": " \t\u3000\u200b\n"},
            400,
            "prompt",
            "invalid_value",
            "blank: say what to generate",
        ),
        ({"n": 0}, 400, "n", "invalid_value", "n is 0: it should be greater than or equal to 1"),
        ({"n": 5}, 400, "n", "integer_above_max_value", "n is 5: give 1 to 4"),
        ({"n": "2"}, 400, "n", "invalid_value", "n is '2': it should be a valid integer"),
        ({"n": True}, 400, "n", "invalid_value", "n is True"),
        ({"n": 10**30}, 400, "n", "integer_above_max_value", "give 1 to 4"),
        ({"seed": -1}, 400, "seed", "invalid_value", "seed is -1"),
        ({"seed": 2**62 + 1}, 400, "seed", "invalid_value", "less than or equal to"),
        ({"seed": 1.5}, 400, "seed", "invalid_value", "seed is 1.5"),
        (
            {"response_format": "url"},
            400,
            "response_format",
            "invalid_value",
            "'url': it should be 'b64_json'",
        ),
        ({"output_format": "gif"}, 400, "output_format", "invalid_value", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, 400, "output_compression", "invalid_value", "give jpeg or webp"),
        (
            {"output_compression": 101},
            400,
            "output_compression",
            "invalid_value",
            "less than or equal to 100",
        ),
        ({"quality": "best"}, 400, "quality", "invalid_value", "'low', 'medium', 'high'"),
        ({"stream": 1}, 400, "stream", "invalid_value", "stream is 1"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images", "invalid_value", "less than or equal"),
        ({"partial_images": 2}, 400, "partial_images", "invalid_value", "set stream, or leave it out"),
        ({"progress": True}, 400, "progress", "invalid_value", "set stream, or leave it out"),
        ({"num_inference_steps": 9}, 400, "num_inference_steps", "invalid_value", "3 of quality medium was"),
        (
            {"num_inference_steps": 31, "quality": "high"},
            400,
            "num_inference_steps",
            "invalid_value",
            "num_inference_steps is 31: give 2 to 30",
        ),
        (
            {"guidance_scale": 4, "quality": "low"},
            400,
            "guidance_scale",
            "invalid_value",
            "give quality high",
        ),
        ({"guidance_scale": 0.5}, 400, "guidance_scale", "invalid_value", "greater than or equal to 1"),
        ({"guidance_scale": float("nan")}, 400, None, "invalid_json", "the body is not JSON"),
        ({"size": "1024x1024"}, 400, "size", "invalid_value", "this model generates 28x28"),
        ({"model": "dall-e-3"}, 404, "model", "model_not_found", "this endpoint serves 'tiny'"),
        ({"sed": 3}, 400, "sed", "unknown_parameter", "unknown parameter sed"),
        ({"a b": 3}, 400, "'a b'", "unknown_parameter", "unknown parameter 'a b'"),
        ({"\ud800": 3}, 400, None, "invalid_json", "the body is not"),
    ],
)
def test_refusals_name_field_value_and_cure(client, change, status, param, code, said):
    body = json.dumps({"prompt": "Bag"} | change)
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert said in refused(answer, status, param, code)


def test_a_missing_prompt_is_named(client):
    assert refused(client.post(PATH, json={"n": 1}), 400, "prompt", "missing_required_parameter")


NO_JSON_OBJECTS = {
    "cut off": b'{"prompt": "Bag"',
    "empty": b"",
    "a list": b'[{"prompt": "Bag"}]',
    "a number": b"3",
    "nothing": b"null",
    "two": b'{"prompt": "Bag"} {}',
    "a comma more": b'{"prompt": "Bag",}',
    "other quotes": b"{'prompt': 'Bag'}",
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "Bag"}'.encode("utf-16"),
    "half a character": b'{"prompt": "\\ud83d"}',
    "depth": b'{"prompt": "Bag", "user": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "digits": b'{"prompt": "Bag", "n": ' + b"9" * 5000 + b"}",
    "NaN": b'{"prompt": "Bag", "guidance_scale": NaN}',
    "Infinity": b'{"prompt": "Bag", "timeout_s": Infinity}',
    "-Infinity": b'{"prompt": "Bag", "user": -Infinity}',
}


@pytest.mark.parametrize("body", NO_JSON_OBJECTS.values(), ids=NO_JSON_OBJECTS)
def test_what_is_no_json_object_is_refused(client, body):
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert "the body is not" in refused(answer, 400, None, "invalid_json")


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", None]
)
def test_another_content_type_is_refused(client, kind):
    headers = {"content-type": kind} if kind else {}
    answer = client.post(PATH, content=b'{"prompt": "Bag"}', headers=headers)
    assert "Content-Type: application/json" in refused(answer, 400, None, "invalid_json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_by_its_other_names_is_read_and_a_byte_order_mark_passed_over(client, kind):
    body = b'\xef\xbb\xbf{"prompt": "Bag", "n": 1.0}'
    assert client.post(PATH, content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_refused(client, chunked):
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'
    content = iter([body[:1000], body[1000:]]) if chunked else body
    answer = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert str(MAX_BODY_BYTES) in refused(answer, 413, None, "request_too_large")
