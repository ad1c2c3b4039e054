"""What a subblock can become: specs, building and fitting candidates, and the child's model code."""
