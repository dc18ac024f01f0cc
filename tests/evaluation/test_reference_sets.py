"""Reference sets: the shipped one, and ADM's files as they should and should not be."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from harmonica.builtin import CLASSIFIER
from harmonica.evaluation import fashion_mnist, reference_sets
from harmonica.evaluation.feature_extractors import ClassifierFeatures, Features
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance
from harmonica.evaluation.reference_sets import builtin_reference, read_adm_reference


class MeanColours:
    """In the place of Inception, whose features are of no matter here."""

    def of_pixels(self, pixels_NCHW: torch.Tensor) -> Features:
        colours = pixels_NCHW.float().mean((2, 3))
        return Features(colours, colours, colours)


def gaussians() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "mu": generator.normal(size=2048).astype(np.float32),
        "sigma": np.eye(2048, dtype=np.float32) * 2,
        "mu_s": generator.normal(size=2023),
        "sigma_s": np.eye(2023),
    }


def test_the_shipped_reference_is_of_the_test_images() -> None:
    reference = builtin_reference()
    assert reference.pooled is not None and reference.spatial is not None
    assert reference.pooled.count == reference.spatial.count == 10_000
    assert reference.features_MF is not None and reference.features_MF.shape == (2000, 96)
    alike = FeatureStatistics.from_features(reference.features_MF)
    assert frechet_distance(alike, reference.pooled) < 0.05


def test_the_shipped_reference_is_what_the_classifier_sees(tmp_path: Path) -> None:
    if not fashion_mnist.DEFAULT_FOLDER.exists():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    images = torch.tensor(fashion_mnist.load_fashion_mnist("test")[0][:100]).float() / 127.5 - 1
    expected = ClassifierFeatures(CLASSIFIER)(images).pooled_NF
    found = builtin_reference().features_MF
    assert found is not None
    torch.testing.assert_close(found[:100], expected, rtol=1e-3, atol=1e-3)


def test_adm_s_gaussians_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_sets, "MAX_IMAGES", 60)
    images = np.random.default_rng(1).integers(0, 256, (70, 6, 8, 3), dtype=np.uint8)
    path, known = tmp_path / "reference.npz", gaussians()
    np.savez(path, arr_0=images, **known)
    found = read_adm_reference(path, MeanColours())  # type: ignore[arg-type]
    assert found.pooled is not None and found.spatial is not None and found.features_MF is not None
    np.testing.assert_array_equal(found.pooled.mean, known["mu"])
    np.testing.assert_array_equal(found.spatial.covariance, known["sigma_s"])
    np.testing.assert_allclose(found.features_MF, images[:60].mean((1, 2)), rtol=1e-5)
    assert read_adm_reference(path).features_MF is None


def test_compressed_and_without_spatial_statistics(tmp_path: Path) -> None:
    known = gaussians()
    np.savez_compressed(tmp_path / "a.npz", mu=known["mu"], sigma=known["sigma"])
    found = read_adm_reference(tmp_path / "a.npz")
    assert found.pooled is not None and found.spatial is None


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path, make_bomb) -> None:
    bomb, marker = make_bomb
    np.savez(tmp_path / "a.npz", mu=np.array([bomb()], dtype=object), sigma=gaussians()["sigma"])
    with pytest.raises(ValueError, match="holds an array of type object"):
        read_adm_reference(tmp_path / "a.npz")
    assert not marker.exists()


def claims_to_be(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Path:
    """An archive whose array has a header and no data."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": dtype})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", header.getvalue())
        archive.writestr("sigma.npy", b"")
    return path


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        ("mu", (10**12,), "<f8", "has mu of shape"),
        ("mu", (2048,), "<i8", "has mu of shape"),
        ("mu", (2048,), "<f8", "ends early"),
        ("arr_0", (5, 10**6, 10**6, 3), "|u1", "has arr_0 of shape"),
        ("arr_0", (5, 4, 4, 3), "|u1", "ends early"),
        ("other", (5,), "<f8", "holds other, sigma"),
    ],
)
def test_headers_are_believed_only_where_they_fit(tmp_path: Path, name, shape, dtype, words) -> None:
    path = claims_to_be(tmp_path / "a.npz", name, shape, dtype)
    with pytest.raises(ValueError, match=rf"evaluate.reference_statistics .*{words}.*: give an .npz"):
        read_adm_reference(path, MeanColours())  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_adm_reference(tmp_path / "a.npz")
