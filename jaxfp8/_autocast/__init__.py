"""autocast: finds a function's products, judges them, and runs it with the chosen ones in FP8."""
