"""Release facts: the package's version and how it is installed, for messages and for files that name it.

It is not in a registry of packages, so no text may say `pip install svdq_hf`. Only the standard library is
imported here.
"""

VERSION = "0.1.0"


def install_command(extra: str = "") -> str:
    """The shell command that installs the package from a checkout of it.

    Args:
        extra: name of an optional dependency group of pyproject.toml; empty: the package alone.

    >>> install_command("peft")
    "pip install -e '.[peft]'"
    >>> install_command()
    'pip install -e .'
    """
    return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."


def how_to_install(extra: str = "") -> str:
    """`install_command` and where to run it, as the end of an error message.

    Args:
        extra: name of an optional dependency group of pyproject.toml; empty: the package alone.

    >>> how_to_install("peft")
    "pip install -e '.[peft]' in a checkout of svdq_hf"
    """
    return f"{install_command(extra)} in a checkout of svdq_hf"
