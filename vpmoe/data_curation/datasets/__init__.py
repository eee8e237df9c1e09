"""Conversations, texts, chats and pairs become token files that training reads: plan, encode, write, finish."""
