defmodule Bombus.RerankingTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Tokenizer}

  @demo Path.expand("../../priv/models/demo", __DIR__)

  setup_all do
    folder = Path.join(System.tmp_dir!(), "bombus-reranking-#{System.pid()}")
    File.mkdir_p!(folder)
    on_exit(fn -> File.rm_rf!(folder) end)
    File.cp!("#{@demo}/tokenizer_config.json", "#{folder}/tokenizer_config.json")
    tokenizer = JSON.decode!(File.read!("#{@demo}/tokenizer.json"))

    File.write!(
      "#{folder}/tokenizer.json",
      JSON.encode!(update_in(tokenizer["model"], &with_no/1))
    )

    %{model: Bombus.load_model!(:demo), tokenizer: Bombus.load_tokenizer!({:local, folder})}
  end

  # The demo's tokenizer has "yes"; "no" takes the place of its last token.
  defp with_no(%{"vocab" => vocab, "merges" => merges} = model) do
    {last, id} = Enum.max_by(vocab, &elem(&1, 1))
    vocab = vocab |> Map.delete(last) |> Map.put("no", id)
    %{model | "vocab" => vocab, "merges" => List.replace_at(merges, -1, ["n", "o"])}
  end

  # Qwen3-Reranker's prompt, as its model card has it.
  defp prompt(instruction, query, document) do
    """
    <|im_start|>system
    Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
    Note that the answer can only be "yes" or "no".<|im_end|>
    <|im_start|>user
    <Instruct>: #{instruction}
    <Query>: #{query}
    <Document>: #{document}<|im_end|>
    <|im_start|>assistant
    <think>

    </think>

    """
  end

  # By the log-probabilities of both answers.
  defp probability(%{model: model, tokenizer: tokenizer}, prompt, options) do
    {:ok, ids} = Tokenizer.encode(tokenizer, prompt, add_special_tokens: false)

    [yes, no] =
      for answer <- ["yes", "no"] do
        {:ok, [id]} = Tokenizer.encode(tokenizer, answer)
        {:ok, logprobs} = Bombus.score(model, ids ++ [id], options)
        List.last(logprobs)
      end

    1 / (1 + :math.exp(no - yes))
  end

  test "a document's score is the probability of yes beside no", context do
    query = "What do bees eat?"
    documents = ["Tea is hot.", "Bees eat nectar.", String.duplicate("Rain. ", 100), ""]
    web = "Given a web search query, retrieve relevant passages that answer the query"
    pirate = Bombus.load_adapter!({:demo, "pirate"})

    for {options, instruction} <- [
          {[], web},
          {[instruction: "Find a post"], "Find a post"},
          {[adapter: pirate, timeout: 60_000], web}
        ] do
      assert {:ok, scores} =
               Bombus.rerank(context.model, context.tokenizer, query, documents, options)

      assert length(scores) == length(documents)

      for {score, document} <- Enum.zip(scores, documents) do
        by_hand = prompt(instruction, query, document)
        own = probability(context, by_hand, Keyword.take(options, [:adapter]))
        assert_in_delta score, own, 1.0e-3
        assert score > 0 and score < 1
      end
    end

    assert {:ok, []} = Bombus.rerank(context.model, context.tokenizer, query, [])
  end

  test "what is wrong is an error that names the document", context do
    %{model: model, tokenizer: tokenizer} = context
    long = String.duplicate("coffee ", 3000)
    assert {:error, error} = Bombus.rerank(model, tokenizer, "tea", ["tea", long, "rain"])
    assert %Error{reason: :prompt_too_long, message: "document 2 of 3: " <> _} = error
    assert {:error, error} = Bombus.rerank(model, tokenizer, "tea", ["tea", <<255>>])
    assert %Error{reason: :bad_request, message: "document 2 of 2: " <> _} = error
    assert {:error, error} = Bombus.rerank(model, tokenizer, <<255>>, ["tea"])
    assert %Error{reason: :bad_request, message: "the query: " <> _} = error

    assert {:error, error} = Bombus.rerank(model, Bombus.load_tokenizer!(:demo), "tea", ["tea"])
    assert %Error{reason: :unsupported} = error
    assert error.message =~ ~s("no")

    for {query, documents, options} <- [
          {:tea, ["tea"], []},
          {"tea", "tea", []},
          {"tea", [1], []},
          {"tea", ["tea"], [pooling: :last]},
          {"tea", ["tea"], [instruction: 1]}
        ] do
      assert_raise ArgumentError, fn ->
        Bombus.rerank(model, tokenizer, query, documents, options)
      end
    end
  end
end
