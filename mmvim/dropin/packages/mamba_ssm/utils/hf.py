"""Access to the Hugging Face hub, which mmvim does not offer."""

from mmvim.dropin.placeholders import attributes_of

__getattr__ = attributes_of(__name__)
