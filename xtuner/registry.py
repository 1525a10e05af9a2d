"""The registries: names that a config may write in place of a Python object.

- `BUILDER` builds any `dict(type=..., **kwargs)`, where `type` is a registered name or a callable itself.
- `MAP_FUNC` holds the functions that turn a raw record into a conversation (`xtuner.dataset.map_fns`).
- `TEMPLATES` holds the prompt formats (`xtuner.dataset.template`).
"""

from mmengine.registry import Registry

BUILDER = Registry('builder')
MAP_FUNC = Registry('map function', locations=['xtuner.dataset.map_fns'])
TEMPLATES = Registry('template', locations=['xtuner.dataset.template'])
