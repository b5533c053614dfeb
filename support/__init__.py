"""What a reader may take on trust. (But policy.py, on two precisions, is worth three minutes.)"""
