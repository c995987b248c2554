"""Operations on quantized arrays, one file a family: reference, custom call, partitioning, public function."""
