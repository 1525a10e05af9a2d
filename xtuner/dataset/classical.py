"""Names that classical xtuner configs import, implemented by the functions of this package.

Options for what this package always does (isolated samples in a pack, removing columns, several processes) have no
effect; unsupported ones raise an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import Dataset

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.dataset.map_fns import resolve_map_fn
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates.builtin import get_template
from xtuner.dataset.templates.template import Template
from xtuner.errors import ConfigError
from xtuner.registry import BUILDER


def template_map_fn_factory(template: str | Template) -> Template:
    """Returns the template, which is applied by the encoder and not by a map function."""
    return get_template(template)


def process_hf_dataset(
    dataset: Any,
    tokenizer: Any,
    max_length: int,
    dataset_map_fn: Any = None,
    template_map_fn: Any = None,
    max_dataset_length: int | None = None,
    split: str = 'train',
    remove_unused_columns: bool = False,
    rename_maps: list[Mapping[str, str]] | None = None,
    shuffle_before_pack: bool = True,
    pack_to_max_length: bool = True,
    use_varlen_attn: bool = False,
    input_ids_with_output: bool = True,
    with_image_token: bool = False,
    map_num_proc: int = 1,
) -> PreparedDataset:
    """Returns the packs of a data set loaded by the `datasets` library, or of the dict that says how to load it.

    Args:
        dataset: A data set, or `dict(type=load_dataset, path=...)`.
        tokenizer: A tokenizer, or `dict(type=AutoTokenizer.from_pretrained, ...)`.
        max_length: Maximum tokens per pack.
        dataset_map_fn: A map function, its name, or None to detect the format.
        template_map_fn: `dict(type=template_map_fn_factory, template=...)`, a template, or None to train the
            texts as they are.
        max_dataset_length: Number of records to use, from the first; None for all.
        split: The split to use if the data set has several.
        remove_unused_columns: No effect: only what the map function returns is used.
        rename_maps: `dict(old=..., new=...)` for each column to rename before the map function sees it.
        shuffle_before_pack: Whether to pack across the whole data set (True) or in data order (False).
        pack_to_max_length: Whether conversations share packs.
        use_varlen_attn: No effect: samples in a pack never attend to each other.
        input_ids_with_output: Must be True.
        with_image_token: Must be False.
        map_num_proc: No effect: encoding uses all cores.

    Raises:
        ConfigError: For images, or for prompts without answers.
    """
    if with_image_token or not input_ids_with_output:
        raise ConfigError('process_hf_dataset: `with_image_token` and `input_ids_with_output=False` are for images, '
                          'which this toolkit cannot train on')  # fmt: skip
    loaded = BUILDER.build(dict(dataset)) if isinstance(dataset, Mapping) and 'type' in dataset else dataset
    loaded = loaded[split] if isinstance(loaded, Mapping) else loaded
    for rename in rename_maps or ():
        loaded = loaded.rename_column(rename['old'], rename['new'])
    if max_dataset_length is not None:
        loaded = loaded.select(range(min(max_dataset_length, len(loaded))))
    packing = 'none' if not pack_to_max_length else 'best_fit' if shuffle_before_pack else 'stream'
    config = DatasetConfig(source=loaded, map_fn=dataset_map_fn and resolve_map_fn(dataset_map_fn), packing=packing,
                           max_length=max_length, on_bad_record='skip', unique_id=None)  # fmt: skip
    return _prepare(config, tokenizer, template_map_fn)


def process_ms_dataset(dataset: Any, split: str = 'train', **options: Any) -> PreparedDataset:
    """Returns the packs of a data set loaded by ModelScope; for the other options see `process_hf_dataset`."""
    loaded = BUILDER.build(dict(dataset)) if isinstance(dataset, Mapping) and 'type' in dataset else dataset
    loaded = loaded.to_hf_dataset() if hasattr(loaded, 'to_hf_dataset') else loaded
    return process_hf_dataset(loaded, split=split, **options)


class ConcatDataset(TorchConcatDataset):
    """Concatenation of data sets; each may be a dict that says how to build it."""

    def __init__(self, datasets: list[Any]) -> None:
        super().__init__([_built(dataset) for dataset in datasets])

    @property
    def lengths(self) -> list[int]:
        """Length of each item in tokens."""
        return [int(length) for dataset in self.datasets for length in dataset.lengths]  # type: ignore[attr-defined]


class MOSSSFTDataset(Dataset):
    """MOSS-003 SFT with plugins; one conversation per item.

    Args:
        data_file: The JSON or JSONL file.
        tokenizer: A tokenizer with MOSS's control tokens, or the dict that builds it.
        max_length: Maximum tokens per item; None for 2048.
        bot_name: Must be None: the record's own system message is used.
    """

    def __init__(
        self, data_file: str | os.PathLike, tokenizer: Any, max_length: int | None = None, bot_name: str | None = None
    ) -> None:
        if bot_name is not None:
            raise ConfigError(f'MOSSSFTDataset: `bot_name` is {bot_name!r}; rename the bot in the data instead')
        config = DatasetConfig(source=str(data_file), map_fn='moss_003_sft', max_length=max_length or 2048,
                               packing='none', on_bad_record='skip', unique_id=None)  # fmt: skip
        self.prepared = _prepare(config, tokenizer, get_template('moss_sft'))
        self.lengths = self.prepared.lengths

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prepared[index]


def _prepare(config: DatasetConfig, tokenizer: Any, template: Any) -> PreparedDataset:
    tokenizer, template = _built(tokenizer), _built(template)
    template = get_template('plain' if template is None else template, tokenizer)
    prepared = prepare_dataset(config, tokenizer=tokenizer, template=template)
    assert prepared is not None
    return prepared


def _built(value: Any) -> Any:
    """Builds a dict with `type` (a callable or a registered name); returns anything else unchanged."""
    if not (isinstance(value, Mapping) and 'type' in value):
        return value
    options = dict(value)
    kind: str | Callable[..., Any] = options.pop('type')
    return kind(**options) if callable(kind) else BUILDER.build(dict(value))
