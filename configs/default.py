"""Every field at its default: a config to start from. The fields are in jaxmerge/config.py."""

from jaxmerge.config import default as get_config

__all__ = ["get_config"]
