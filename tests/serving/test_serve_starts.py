"""What a deployment is started with and why it does not start: its port, its arguments, its router."""

import socket

import pytest

from harmonica.validation.settings import SettingError
from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle
from pipelines.serving.serve_args import ServeArgs


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"serve.port is {port}: .*give another port"):
            lifecycle.check_port(ServeConfig(port=port))


UNFIT = "The deployment failed to start 1 times in a row. Error:\nTraceback ...\nValueError: num_layers is 2"
NO_CARD = "Retrying 2 more time(s). Error:\nRuntimeError: ASGI lifespan startup failed. Check replica logs."


@pytest.mark.parametrize("names", [("Sampler", "Api"), ("Api", "Sampler")])
def test_the_reason_for_a_failed_start_is_the_model_s_whichever_deployment_is_listed_first(names):
    """`Api` asks `Sampler` for the model card, so it fails too; seen under load on a cluster."""

    def reason(**messages):
        return lifecycle.failure_reason({name: messages[name] for name in names})

    assert reason(Sampler=UNFIT, Api="") == "ValueError: num_layers is 2"
    assert reason(Sampler=UNFIT, Api=NO_CARD) == "ValueError: num_layers is 2"
    assert reason(Sampler="", Api="Error:\nValueError: no keys here") == "ValueError: no keys here"
    assert "ASGI lifespan" in reason(Sampler="", Api=NO_CARD)
    assert reason(Sampler="", Api="waiting for resources") == ""


def test_arguments_from_yaml():
    args = ServeArgs.model_validate({"serve": {"max_batch_size": 4}, "tracking_uri": "http://mlflow:5000"})
    assert args.serve.max_batch_size == 4 and args.serve.min_replicas == 1
    refused = {
        "serve.max_batch_sise is 4: there is no such setting": {"serve": {"max_batch_sise": 4}},
        "registered_modle is 'x': there is no such setting": {"registered_modle": "x"},
        "serve.max_batch_size is 0: give 1 or more": {"serve": {"max_batch_size": 0}},
        "serve.max_replicas is 1: give serve.min_replicas": {"serve": {"min_replicas": 2}},
        "follow_s is 0: give seconds above 0": {"follow_s": 0},
        "model.cacheable is 5: give some of attn": {"model": {"cacheable": 5}},
    }
    for words, given in refused.items():
        with pytest.raises(SettingError, match=words) as caught:
            ServeArgs.model_validate(given)
        assert "\n" not in str(caught.value)


def test_router_folder_goes_before_mlflow_and_mlflow_before_the_built_in(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    chosen = ServeArgs(router="mine").resolved()
    assert (chosen.router, chosen.tracking_uri) == ("mine", "")
    chosen = ServeArgs().resolved()
    assert (chosen.router, chosen.tracking_uri) == ("", "http://mlflow:5000")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    chosen = ServeArgs().resolved()
    assert chosen.tracking_uri == "" and chosen.current_version() == "builtin"
