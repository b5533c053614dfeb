"""What a reader may take on trust: nothing in here is needed to understand GCPO."""
