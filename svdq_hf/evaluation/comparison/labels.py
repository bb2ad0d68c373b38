"""Labels of configs: the preset that a config is, and the choices beside it.

Not here: the presets (`config.presets`).
"""

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import CHOICES
from svdq_hf.config.presets import PRESETS


def preset_of(config: SVDQConfig) -> str | None:
    """The preset that a config has all choices of; None: there is none.

    >>> preset_of(SVDQConfig.best(lm_head=True)), preset_of(SVDQConfig())
    ('best', None)
    """
    fitting = {name: preset.changes for name, preset in PRESETS.items() if _has(config, preset.changes)}
    return max(fitting, key=lambda name: len(fitting[name]), default=None)


def _has(config: SVDQConfig, changes: dict[str, object]) -> bool:
    return all(getattr(config, name) == value for name, value in changes.items())


def label(config: SVDQConfig) -> str:
    """A short name of a config: its preset, and the choices beside it.

    >>> label(SVDQConfig()), label(SVDQConfig.best(bits=8)), label(SVDQConfig(lm_head=True))
    ('svdq', 'svdq-best bits=8', 'svdq lm_head')
    """
    default, preset = SVDQConfig(bits=config.bits), preset_of(config)  # some choices follow from the bits
    values = {name: getattr(config, name) for name in CHOICES if name != "layer_k"}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    changed |= {} if config.bits == SVDQConfig().bits else {"bits": config.bits}
    rest = {key: value for key, value in changed.items() if not preset or key not in PRESETS[preset].changes}
    words = [key if value is True else f"{key}={value}" for key, value in rest.items()]
    return " ".join([f"svdq-{preset}" if preset else "svdq", *words])
