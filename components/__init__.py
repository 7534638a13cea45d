"""The page. Imports llm_merge and gradio; nothing here computes a weight or merges a tensor."""
