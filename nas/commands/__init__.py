"""The commands of `nas`, one a file: a function, its options, its examples. Heavy imports happen inside the functions."""
