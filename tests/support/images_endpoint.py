"""The path of image generation, and what every refusal of it has."""

PATH = "/v1/images/generations"


def refused(answer, status, param, code):
    """The message, once the answer is an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["param"], error["code"]) == (param, code)
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return error["message"]
