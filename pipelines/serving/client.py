"""Ask a running endpoint for an image, and make a command with which users can."""

import json
import shlex
import time
from typing import Any

import httpx

from .auth import key_headers

_READY_TIMEOUT_S = 60.0
_GENERATE_TIMEOUT_S = 600.0


def first_image(url: str, prompt: str, seed: int, *, api_keys_file: str = "") -> dict[str, Any]:
    """Ask a running endpoint for one image, and return the decoded answer.

    It asks again while the endpoint starts or is busy, and if the body did not arrive (408).

    Args:
        api_keys_file: the endpoint's own `serve.api_keys_file`; its first key is used.

    Raises:
        RuntimeError: the request is rejected, or the endpoint cannot be reached for a minute.
    """
    deadline = time.monotonic() + _READY_TIMEOUT_S
    endpoint, headers = f"{url}/v1/images/generations", key_headers(api_keys_file)
    reason: object = None
    while time.monotonic() < deadline:
        try:
            body = {"prompt": prompt, "seed": seed}
            answer = httpx.post(endpoint, json=body, headers=headers, timeout=_GENERATE_TIMEOUT_S)
        except httpx.TransportError as error:
            reason = error
        else:
            if answer.is_success:
                answered: dict[str, Any] = answer.json()
                return answered
            reason = answer.text
            if answer.status_code not in (404, 408, 503):
                break
        time.sleep(0.5)
    raise RuntimeError(f"{url} gave no image of {prompt!r}: {reason}")


def curl_command(url: str, headers: dict[bytes, bytes]) -> str:
    """Return a shell command that writes an image to image.png.

    The image is of the model's first class, or of a prompt.

    Args:
        headers: with a key, if the endpoint needs one.
    """
    entries = httpx.get(f"{url}/v1/models", headers=headers, timeout=10).json()["data"]
    card = next(entry for entry in entries if "error" not in entry)  # one that could be loaded
    prompt = card["class_names"][0] if card["class_names"] else "a photo of a sneaker"
    asked = {"prompt": prompt, "seed": 1} | ({"model": card["id"]} if card is not entries[0] else {})
    body = shlex.quote(json.dumps(asked))
    decode = "import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)"
    key = ' -H "Authorization: Bearer $HARMONICA_API_KEY"' if headers else ""
    return (
        f"  curl -s {url}/v1/images/generations{key} -H 'Content-Type: application/json' -d {body} \\\n"
        f'    | python3 -c \'{decode}["data"][0]["b64_json"]))\' > image.png'
    )
