"""The pyramid, which nobody else has published: nothing to compare with."""

CASES = [("va_pyramid_small", {"drop_path_rate": 0.0}, None, (0.0, 0.0))]
