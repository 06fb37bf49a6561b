"""PEFT adapters (placeholder)."""


def recognises(path):
    return False
