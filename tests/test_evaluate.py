def test_x(protein_data, source_data, source_model):
    import json
    for d in (protein_data, source_data):
        m = json.loads((d/"manifest.json").read_text()); print({k: {a: v[a] for a in ("bytes","rows","tokens","documents")} for k, v in m["splits"].items()}, m["vocab_size"])
    import os; print(os.listdir(source_model), os.listdir(source_data/"tokenizer"))
