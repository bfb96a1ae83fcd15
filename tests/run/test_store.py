"""URIs of MLflow's stores: spelled in many ways, with passwords, relative to a folder."""

import os

import pytest

from s2t2_dist.run import store


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch):
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("http://h", "http://h/", True),
        ("http://h:80", "HTTP://H", True),
        ("https://h:443/x/", "https://h/x", True),
        ("http://localhost:5000", "http://127.0.0.1:5000/", True),
        ("http://[::1]:5000", "http://localhost:5000", True),
        ("http://a:b@h", "http://h", True),
        ("http://h", "https://h", False),
        ("http://h:5000", "http://h", False),
        ("http://h/a", "http://h/b", False),
        ("http://h", "http://g", False),
        ("sqlite:////a.db", "sqlite:////b.db", False),
        ("postgresql://u:p@h/d", "postgresql://u@h/d", True),
        ("http://h:port", "http://h:port", True),
    ],
)
def test_the_same_store(one, other, expected):
    assert store.same(one, other) == store.same(other, one) == expected


def test_credentials_of_a_server_go_where_mlflow_looks(monkeypatch):
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "before")
    place = store.choose("https://ada:s3%40cret@host:5000/x", None)
    assert (place.uri, place.secret_uri) == ("https://host:5000/x", "https://host:5000/x")
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ada"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s3@cret"


def test_a_databases_password_stays_with_its_client(monkeypatch):
    place = store.choose("postgresql://ada:s3cret@host/db", None)
    assert place.uri == place.given == "postgresql://ada@host/db"
    assert place.secret_uri == "postgresql://ada:s3cret@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ada:other@host/db")
    assert store.choose(None, {"uri": place.uri}).secret_uri.count("other") == 1


def test_errors_have_no_password():
    error = ValueError("could not connect to\n postgresql://ada:s3cret@host/db?password=s3cret now")
    assert store.one_line(error) == (
        "could not connect to postgresql://ada@host/db?password=*** now"
    )
    long = "cause " * 200
    assert store.one_line(ValueError(long)) == long.strip()


@pytest.mark.parametrize("given", [None, "sqlite:///own.db"])
def test_a_store_that_depends_on_the_folder_is_that_of_the_first_start(
    given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = store.choose(given, None)
    assert first.file == tmp_path / ("mlflow.db" if given is None else "own.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    link = {"uri": first.uri, "given": first.given}
    assert store.choose(given, link).secret_uri == store.choose(given, link).uri == first.uri
    assert store.choose("sqlite:////another.db", link).uri == "sqlite:////another.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert store.choose(given, link).uri == "http://server"
