"""Arguments of the classes that a config names."""

from __future__ import annotations

import pytest

from tests.config.test_load import FLAGSHIP
from xtuner.config.load import load_config
from xtuner.errors import ConfigError
from xtuner.registry import check_arguments

pytestmark = pytest.mark.unit


@pytest.mark.torch
def test_an_argument_that_a_type_lacks_is_named_with_the_nearest() -> None:
    config = load_config(FLAGSHIP, {'optimizer.beta': (0.9, 0.99)})
    with pytest.raises(ConfigError, match=r"unknown key `optimizer.beta` .*did you mean 'betas'"):
        check_arguments(config.optimizer, 'optimizer', given=('params',))
    with pytest.raises(ConfigError, match='cannot be imported'):
        check_arguments({'type': 'no_such_module:Thing'}, 'optimizer')
    with pytest.raises(ConfigError, match="has no 'AdamZ'"):
        check_arguments({'type': 'torch.optim:AdamZ'}, 'optimizer')
