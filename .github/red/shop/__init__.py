"""A small shop: articles, baskets and receipts."""
