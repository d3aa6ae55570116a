"""The apparatus that measures the claims of the paper and makes a book of them."""
