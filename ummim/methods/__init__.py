"""The methods, one file each. A recipe's ``method.name`` is the file's name."""
