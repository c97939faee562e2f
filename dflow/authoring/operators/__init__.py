"""The operators that come with dflow, one file each."""
