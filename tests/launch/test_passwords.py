"""What counts as a password on its way into a file."""

import pytest

from cctrain.errors import UsageError
from cctrain.launch.passwords import check_no_secrets, without_secrets

ENVIRONMENT = {"MLFLOW_TRACKING_PASSWORD": "correct horse", "HOME": "/home/me", "SHORT_TOKEN": "abc"}


@pytest.mark.parametrize(
    "text",
    [
        "tracking: {uri: 'https://me:hunter22@mlflow.example.org'}",
        "postgresql://me:hunter22@db/mlflow",
        "https://mlflow.example.org?token=hunter22",
        "export MLFLOW_TRACKING_PASSWORD=hunter22",
        'WANDB_API_KEY="hunter22"',
        "x\n  export my_secret='hunter22'",
        "--key correct horse",
    ],
)
def test_a_password_is_refused_and_not_repeated(text):
    with pytest.raises(UsageError) as raised:
        check_no_secrets(text, "the script", ENVIRONMENT)
    assert str(raised.value).startswith("the script ")
    assert "hunter22" not in str(raised.value)
    assert "correct horse" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "tracking: {uri: 'https://mlflow.example.org'}",
        "export MLFLOW_TRACKING_PASSWORD=$(cat ~/.mlflow)",
        'export MLFLOW_TRACKING_PASSWORD="$PASSWORD"',
        "export HOME=/home/me",
        "max_tokens: 100",
        "abc",
    ],
)
def test_what_is_none_is_let_through(text):
    check_no_secrets(text, "the script", ENVIRONMENT)


def test_a_text_that_must_be_kept_is_kept_without_its_passwords():
    text = "-uri: https://me:hunter22@host/x\n+key: correct horse\n"
    assert without_secrets(text, ENVIRONMENT) == "-uri: https://host/x\n+key: …\n"
