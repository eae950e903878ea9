defmodule Bombus.EmbeddingTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Tensor, Tokenizer}

  setup_all do
    %{model: Bombus.load_model!(:demo), tokenizer: Bombus.load_tokenizer!(:demo)}
  end

  @texts ["A post about coffee", "tea", String.duplicate("Rain and tea. ", 60)]

  defp numbers(%Tensor{type: {:f, 32}, binary: binary}),
    do: for(<<number::float-little-32 <- binary>>, do: number)

  defp embed!(context, texts, options \\ []) do
    assert {:ok, vectors} = Bombus.embed(context.model, context.tokenizer, texts, options)
    Enum.map(vectors, &numbers/1)
  end

  defp length_of(vector), do: vector |> Enum.map(&(&1 * &1)) |> Enum.sum() |> :math.sqrt()

  defp assert_near(one, other, most \\ 1.0e-3) do
    assert Enum.map(one, &length/1) == Enum.map(other, &length/1)

    for {a, b} <- Enum.zip(Enum.concat(one), Enum.concat(other)),
        do: assert_in_delta(a, b, most)
  end

  test "a text has a vector as long as 1, alone as among others, on every device", context do
    assert {:ok, [%Tensor{shape: {192}} | _]} =
             Bombus.embed(context.model, context.tokenizer, @texts)

    for pooling <- [:last, :mean] do
      vectors = embed!(context, @texts, pooling: pooling)
      for vector <- vectors, do: assert_in_delta(length_of(vector), 1.0, 1.0e-5)
      alone = Enum.flat_map(@texts, &embed!(context, [&1], pooling: pooling))
      assert_near(vectors, alone)
    end

    cpu = %{context | model: Bombus.load_model!(:demo, device: :cpu)}
    assert_near(embed!(context, @texts), embed!(cpu, @texts), 0.02)
    assert {:ok, []} = Bombus.embed(context.model, context.tokenizer, [])
  end

  test "dimensions are cut first, and lengths may stay", context do
    [raw] = embed!(context, ["tea"], normalize: false)
    [cut] = embed!(context, ["tea"], normalize: false, dimensions: 24)
    assert cut == Enum.take(raw, 24)
    [unit] = embed!(context, ["tea"], dimensions: 24)
    assert_near([unit], [Enum.map(cut, &(&1 / length_of(cut)))], 1.0e-5)
  end

  test "an instruction stands before each text, and adapters apply", context do
    with_it = embed!(context, ["tea", "rain"], instruction: "Find a post")
    by_hand = for text <- ["tea", "rain"], do: "Instruct: Find a post\nQuery:#{text}"
    assert with_it == embed!(context, by_hand)
    pirate = Bombus.load_adapter!({:demo, "pirate"})
    assert embed!(context, ["tea"], adapter: pirate) != embed!(context, ["tea"])
    assert embed!(context, ["tea"], adapter: nil) == embed!(context, ["tea"])
  end

  @tag :tmp_dir
  test "a text gets the tokens that its tokenizer appends", %{tmp_dir: folder} = context do
    # As Qwen3-Embedding's tokenizer does.
    source = Path.expand("../../priv/models/demo", __DIR__)
    for name <- ~w(tokenizer_config.json), do: File.cp!("#{source}/#{name}", "#{folder}/#{name}")
    definition = JSON.decode!(File.read!("#{source}/tokenizer.json"))
    {:ok, [id]} = Tokenizer.encode(context.tokenizer, "<|endoftext|>")

    appends = %{
      type: "TemplateProcessing",
      single: [%{Sequence: %{id: "A", type_id: 0}}, %{SpecialToken: %{id: "end", type_id: 0}}],
      pair: [%{Sequence: %{id: "A", type_id: 0}}, %{Sequence: %{id: "B", type_id: 1}}],
      special_tokens: %{"end" => %{id: "end", ids: [id], tokens: ["<|endoftext|>"]}}
    }

    File.write!(
      "#{folder}/tokenizer.json",
      JSON.encode!(%{definition | "post_processor" => appends})
    )

    appending = %{context | tokenizer: Bombus.load_tokenizer!({:local, folder})}
    assert embed!(appending, ["tea"]) == embed!(context, ["tea<|endoftext|>"])
    assert embed!(appending, [""]) == embed!(context, ["<|endoftext|>"])
  end

  test "what is wrong with a text is an error that names it", context do
    %{model: model, tokenizer: tokenizer} = context
    long = String.duplicate("coffee ", 3000)
    assert {:error, error} = Bombus.embed(model, tokenizer, ["tea", long])
    assert %Error{reason: :prompt_too_long, message: "text 2 of 2: " <> _} = error
    assert {:error, error} = Bombus.embed(model, tokenizer, ["", "tea"])
    assert %Error{reason: :bad_request, message: "text 1 of 2: " <> _} = error
    assert {:error, error} = Bombus.embed(model, tokenizer, ["tea", <<255>>])
    assert %Error{reason: :bad_request, message: "text 2 of 2: " <> _} = error
    texts = List.duplicate(String.duplicate("tea ", 400), 50)
    assert {:error, %Error{reason: :timeout}} = Bombus.embed(model, tokenizer, texts, timeout: 1)

    for {wrong, said} <- [
          {[dimensions: 193], ~r/1..192/},
          {[dimensions: 0], ~r/:dimensions/},
          {[pooling: :first], ~r/:last or :mean/},
          {[instruct: "x"], ~r/unknown option/},
          {[adapter: :news], ~r/adapter/}
        ] do
      assert_raise ArgumentError, said, fn -> Bombus.embed(model, tokenizer, ["tea"], wrong) end
    end

    for wrong <- ["tea", [:tea], nil, ["tea" | "rain"]] do
      assert_raise ArgumentError, ~r/list of strings/, fn ->
        Bombus.embed(model, tokenizer, wrong)
      end
    end
  end

  test "an unloaded model embeds nothing", %{tokenizer: tokenizer} do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-tied"))
    :ok = Bombus.unload(model)
    assert {:error, %Error{reason: :unloaded}} = Bombus.embed(model, tokenizer, ["tea"])
  end
end
