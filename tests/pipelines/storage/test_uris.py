"""URIs that people type: refused in a sentence where they name no place, and no secret is shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soflow_core.failures import InputError
from soflow_pipelines.storage.object_store import LocationError
from soflow_pipelines.storage.opening import open_storage
from soflow_pipelines.storage.uris import without_secrets

SECRET = "s3cr3tpw"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://u:{SECRET}@host/m",
        f"https://{SECRET}@host/m",
        f"https://host/set?token={SECRET}",
        f"https://host/set#{SECRET}",
        f"http://u:{SECRET}@[::1/m",
        f"http://u:{SECRET}@host:abc/m",
        f"s3://KEY:{SECRET}@bucket/x",
        f"s3://bucket/x?token={SECRET}",
        f"postgresql://u:{SECRET}@host/db",
        f"ftp://host/x?token={SECRET}",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(LocationError) as refused:
        open_storage(uri)
    assert SECRET not in str(refused.value)
    assert SECRET not in without_secrets(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "http://[::1",
        "http://127.0.0.1:abc/x",
        "http://127.0.0.1:99999/x",
        "http://",
        "https:///x",
        "http://host/\x1b]0;x\x07",
        "http://host/a b",
        "s3://",
        "s3://[x",
        "s3://bucket/x?scheme=gopher",
        "gopher://x",
        "a" * 5000,
        "a/" * 3000,
        "a\0b",
        "~no_such_user_here/x",
    ],
)
def test_what_is_no_place_is_refused_in_a_sentence(uri: str) -> None:
    with pytest.raises(LocationError) as refused:
        open_storage(uri)
    assert str(refused.value).isprintable()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.text(),
        st.sampled_from(["http://", "s3://", "file://", "x://"]).flatmap(lambda s: st.text().map(s.__add__)),
    )
)
def test_any_text_opens_a_store_or_is_refused_in_a_sentence(text: str) -> None:
    refusal = ""
    try:
        open_storage(text)
    except InputError as error:
        refusal = str(error)
    assert refusal.isprintable()
