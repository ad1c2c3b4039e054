"""The child's model code. The two modules beside this one are copied as they are into every child checkpoint."""
