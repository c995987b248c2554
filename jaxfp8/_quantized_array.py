"""The class where pickles of version 0.1.0 look for it."""

from ._arrays.quantized_array import QuantizedArray as QuantizedArray
