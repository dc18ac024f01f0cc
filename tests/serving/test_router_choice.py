"""Which router `python -m pipelines.serve` starts with, found before Ray starts. MLflow's store is real."""

import asyncio
import dataclasses

import pytest
import ray
from tiny_dit import SHAPE, make_artifact, write_model
from tiny_engine import CONFIG

from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.models import loading
from harmonica.models.loading import BUILTIN, BUILTIN_COLOUR, BUILTIN_TEXT, ModelConfig, load_model
from pipelines import serve
from pipelines.serving import servable_pipeline
from pipelines.serving.auth import ENVIRONMENT
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.requests import EngineRequest
from pipelines.serving.router_choice import choose_router
from pipelines.serving.serve_args import ServeArgs
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create

NAME = "tiny"


@pytest.fixture(autouse=True)
def no_mlflow_named(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models; a store whose champion is of the first."""
    folder = tmp_path_factory.mktemp("choosing")
    model = write_model(folder / "model")
    write_model(folder / "other", shape=dataclasses.replace(SHAPE, num_layers=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = find_or_create("register", "first", str(folder / "runs"), {})
        registry.register(make_artifact(model).save(folder / "router"), name=NAME, run=run)
    return folder


def choose(model, storage, router="", name=NAME):
    return choose_router(ModelConfig(path=str(model)), str(router), name, str(storage))


def test_the_champion_that_fits_is_followed(folder):
    choice = choose(folder / "model", folder / "runs")
    assert choice.tracking_uri.startswith("sqlite:///") and choice.router == ""
    assert choice.summary == "version 1 of tiny, the champion in MLflow"


@pytest.mark.parametrize(("path", "champion"), [(BUILTIN, CHAMPION), (BUILTIN_COLOUR, EMOJI_CHAMPION)])
def test_without_a_store_a_built_in_champion_serves_its_built_in_model(tmp_path, path, champion):
    choice = choose(path, tmp_path)
    assert (choice.tracking_uri, choice.router) == ("", str(champion))
    assert choice.summary == "the built-in champion (no MLflow store yet)"
    assert list(tmp_path.iterdir()) == [], "looking makes no store"


def test_a_champion_of_another_model_gives_way_to_the_built_in_one(folder):
    choice = choose(BUILTIN, folder / "runs")
    assert choice.router == str(CHAMPION) and "the router was made for" in choice.summary
    assert choose(BUILTIN, folder / "runs", name="nobody").router == str(CHAMPION)
    assert ServeArgs(model=ModelConfig(path=BUILTIN_COLOUR)).resolved().router == str(EMOJI_CHAMPION)
    assert ServeArgs(model=ModelConfig(path=BUILTIN_COLOUR)).resolved().current_version() == "builtin"


@pytest.mark.parametrize("path", [BUILTIN_TEXT, "other"])
def test_a_model_for_which_there_is_no_router_computes_every_branch(folder, tmp_path, path):
    choice = choose(path if path == BUILTIN_TEXT else folder / path, tmp_path)
    assert (choice.tracking_uri, choice.router) == ("", "uncached")
    assert choice.summary.startswith("every branch computed, since there is no router for ")
    assert "give --router FOLDER" in choice.summary


def test_where_there_is_a_champion_and_nothing_fits_the_user_has_to_choose(folder):
    with pytest.raises(
        ValueError, match=r"version 1 of tiny, .* does not fit model\.path .*num_layers is 2"
    ) as no:
        choose(folder / "other", folder / "runs")
    assert "give --router FOLDER, --router uncached" in str(no.value) and "\n" not in str(no.value)
    assert choose(folder / "other", folder / "runs", "uncached").router == "uncached"


def test_a_router_that_is_named_has_to_fit(folder, tmp_path):
    assert choose(folder / "model", tmp_path, folder / "router").router == str(folder / "router")
    with pytest.raises(ValueError, match=r"^router is .*, which does not fit model\.path .*num_layers is 2"):
        choose(folder / "other", tmp_path, folder / "router")


@pytest.mark.parametrize("router", ["router", ""])
def test_a_model_in_a_store_is_named_without_its_key(folder, tmp_path, monkeypatch, router):
    for module in (loading, servable_pipeline):
        monkeypatch.setattr(module, "local_path", lambda *_, **__: folder / "other")
    model, store = ModelConfig(path="s3://id:hush@bucket/other"), str(tmp_path if router else folder / "runs")
    with pytest.raises(ValueError, match=r"fit model\.path s3://bucket/other.*num_layers is 2") as no:
        choose_router(model, str(folder / router) if router else "", NAME, store)
    assert "hush" not in str(no.value)
    assert "hush" not in choose_router(model, "", NAME, str(tmp_path)).summary


def test_an_mlflow_that_does_not_answer_is_named_without_its_password(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # and gone after the test
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"champion cannot be fetched from http://127.0.0.1:9") as no:
        choose(folder / "model", folder / "runs")
    assert "--router FOLDER" in str(no.value) and "\n" not in str(no.value)
    assert "secret" not in str(no.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.path=nowhere"], "model.path nowhere does not exist"),
        (["--router=nowhere"], "nowhere has no readable config.json"),
        (["--serve.port=0"], "serve.port"),
        (["--serve.read-timeout-s=0"], "serve.read_timeout_s"),
        (["--serve.api-keys-file=nowhere"], "serve.api_keys_file is 'nowhere', which cannot be read"),
        (["--serve.host=192.0.2.77"], "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_ray_starts(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert serve.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not ray.is_initialized()


def test_even_steps_need_no_router(folder, tmp_path):
    choice = choose(folder / "other", tmp_path, "even-1.8x")
    assert (choice.tracking_uri, choice.router) == ("", "even-1.8x")
    assert choice.summary == "evenly spread steps at 1.8x, without training (--router even-1.8x)"
    with pytest.raises(ValueError, match=r"^router is 'even-1x': give a speed above 1, such as even-1.8x"):
        choose(folder / "model", tmp_path, "even-1x")
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        choose("nowhere", tmp_path, "even-1.8x")
    named = folder / "even-2x"
    with pytest.raises(ValueError, match=r"even-2x has no readable config.json"):
        choose(folder / "model", tmp_path, f"{named}")  # with a slash it is a folder


def test_a_replica_serves_even_steps_under_the_model_s_own_sampler(folder):
    model = ModelConfig(path=str(folder / "model"))
    engine = GenerationEngine(ImageSampler(load_model(model)), NAME, CONFIG)
    args = ServeArgs(model=model, registered_model=NAME, router="even-1.5x").resolved()

    async def run():
        await RegistryWatcher(engine, args).poll()
        await RegistryWatcher(engine, args).poll()
        card = await engine.describe()
        even, high = sorted(card.routers, key=lambda each: each.quality == ("high",))
        assert card.router_version == even.version == "even-1.5x" and even.quality == ("medium", "low")
        assert high.version == "uncached" and even.num_inference_steps == high.num_inference_steps == 20
        assert 1.3 < even.ideal_speedup < 1.6 and 0.3 < card.cur < 0.4
        image = ImageRequest(1, 1, 0)
        fast, whole = [await engine.generate(EngineRequest(image, name)) for name in ("medium", "high")]
        assert (fast.router_version, whole.router_version) == ("even-1.5x", "uncached")
        assert fast.picture != whole.picture

    asyncio.run(run())


def test_every_branch_is_computed_under_the_model_s_own_sampler(folder):
    model = ModelConfig(path=str(folder / "model"))
    engine = GenerationEngine(ImageSampler(load_model(model)), NAME, CONFIG)
    args = ServeArgs(model=model, registered_model=NAME, router="uncached").resolved()

    async def run():
        await RegistryWatcher(engine, args).poll()
        card = await engine.describe()
        (router,) = card.routers
        assert (card.router_version, card.cur) == ("uncached", 0)
        assert router.quality == ("high", "medium", "low") and router.num_inference_steps == 20
        image = ImageRequest(1, 1, 0)
        first, second = [await engine.generate(EngineRequest(image, name)) for name in ("medium", "high")]
        assert first.picture == second.picture and first.router_version == "uncached"

    asyncio.run(run())
