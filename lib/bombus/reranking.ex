defmodule Bombus.Reranking do
  @moduledoc false
  # How well documents answer a query, in Qwen3-Reranker's way: `Bombus.rerank/5`. Source of the prompt,
  # its default instruction and the score: the model card of Qwen3-Reranker.

  alias Bombus.{Embedding, Error, Options, Tokenizer}

  @schema [
            instruction: [
              type: :string,
              default:
                "Given a web search query, retrieve relevant passages that answer the query",
              doc: "what a document is to do for the query, in a sentence"
            ]
          ] ++ Embedding.request_options()

  @before "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and " <>
            "the Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n" <>
            "<|im_start|>user\n"
  @behind "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

  def schema, do: @schema

  def run(model, tokenizer, query, documents, options) do
    options = Options.validate!(options, @schema, "Bombus.rerank/5")
    documents = Embedding.texts!(documents, "the documents")

    unless is_binary(query) do
      raise ArgumentError, "expected the query to be a string, got: #{Options.show(query)}"
    end

    with :ok <- check_query(query),
         :ok <- Embedding.check_utf8(documents, "document"),
         {:ok, yes} <- answer(tokenizer, "yes"),
         {:ok, no} <- answer(tokenizer, "no") do
      texts = for document <- documents, do: prompt(options[:instruction], query, document)
      Embedding.ask(model, tokenizer, texts, {:judgement, yes, no}, options)
    end
  end

  defp check_query(query),
    do: if(String.valid?(query), do: :ok, else: Embedding.not_utf8("the query", query))

  defp prompt(instruction, query, document) do
    "#{@before}<Instruct>: #{instruction}\n<Query>: #{query}\n<Document>: #{document}#{@behind}"
  end

  defp answer(tokenizer, word) do
    case Tokenizer.encode(tokenizer, word, add_special_tokens: false) do
      {:ok, [id]} ->
        {:ok, id}

      {:ok, ids} ->
        Error.error(
          :unsupported,
          "expected a tokenizer with a token for \"#{word}\", as Qwen3-Reranker's: " <>
            "this one makes #{length(ids)} of it"
        )

      {:error, error} ->
        {:error, error}
    end
  end
end
