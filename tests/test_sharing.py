"""What may leave this machine: of URLs those of the web, and no password or token, wherever it stands."""

import pytest

from hf_mim.hub.card import dataset_of
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.sharing import check_secrets, has_secret, masked, shareable


def test_of_urls_only_those_of_the_web_are_published():
    urls = ["s3://secret-bucket/team/photos", "file:///home/me/photos", "hf://datasets/me/photos", "https://host/x.tar"]
    found = [shareable({"dataset": url}) for url in urls]
    assert [entry["dataset"] for entry in found] == ["photos", "photos", "photos", "https://host/x.tar"]
    assert [dataset_of(entry)["id"] for entry in found] == [None] * 4 and "secret" not in str(found)


URLS = {
    "https://me:pw@host/x": True,
    "https://me@host/x": True,
    "simplecache::https://me:pw@host/x.tar": True,
    "zip://a.png::https://me:pw@host/x.zip": True,
    "zip://a.png::s3://bucket/x.zip?sig=abc": True,
    "https://host/x#token=abc": True,
    "https://host/x#/page?jwt=abc": True,
    **{
        f"https://host/x?a=1&{name}=abc": True for name in ("sig", "sas", "token", "access_key", "pwd", "jwt", "apiKey")
    },
    **{f"https://host/x?{name}=abc": True for name in ("X-Amz-Signature", "AWSAccessKeyId", "SharedAccessKey", "auth")},
    "https://host/x?page=2&size=224": False,
    "https://host/x?monkey=1&tokens=3": False,
    "s3://bucket/photos": False,
    "hf://datasets/me/photos@main/x": False,
    "me/photos": False,
}


@pytest.mark.parametrize(("url", "secret"), URLS.items())
def test_secrets_in_urls_are_refused_masked_and_not_published(url, secret):
    assert has_secret(url) == secret
    recipe = {"data": {"dataset": "me/photos", "nested": {"files": ["x", url]}}}
    if not secret:
        return check_secrets(recipe)
    for private in ("pw", "abc"):
        assert private not in masked(url) and private not in str(shareable(recipe))
    with pytest.raises(RecipeError, match="holds a password or token") as caught:
        check_secrets(recipe)
    assert caught.value.key == "data.nested.files" and "abc" not in str(caught.value)


@pytest.mark.parametrize("key", ["hub_token", "password", "api_key", "secretKey", "aws_access_key_id", "pwd", "auth"])
def test_keys_are_judged_by_name_wherever_they_stand(key):
    recipe = {"training": {"a": [{"b": {key: "s3cret"}}], "mask_token": True, "num_register_tokens": 4}}
    with pytest.raises(RecipeError, match="is refused") as caught:
        check_secrets(recipe)
    assert caught.value.key == f"training.a.b.{key}" and "s3cret" not in str(caught.value)
    assert shareable(recipe) == {"training": {"a": [{"b": {}}], "mask_token": True, "num_register_tokens": 4}}
