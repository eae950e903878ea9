defmodule Bombus.TextTest do
  # Bumblebee's shape on Nx.Serving.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]
  alias Bombus.{Error, Fixtures, Serving, Text}

  @moduletag :nx
  @compile {:no_warn_undefined, [Nx.Serving]}
  @prompt "Write a post about coffee"

  setup_all do
    %{model: Bombus.load_model!(:demo), tokenizer: Bombus.load_tokenizer!(:demo)}
  end

  defp endless(options \\ []) do
    model = Bombus.load_model!(Fixtures.checkpoint("f32-untied"))
    {Text.generation(model, nil, [max_new_tokens: 400] ++ options), %{token_ids: [3, 1, 4, 1, 5]}}
  end

  defp free?, do: match?(%{sequences: 0, kv: 0}, Bombus.memory_info())

  test "it runs inline, as Bombus.Serving does", %{model: model, tokenizer: tokenizer} do
    options = [
      max_new_tokens: 60,
      compile: [batch_size: 4, sequence_length: 200],
      defn_options: [compiler: EXLA]
    ]

    nx = Text.generation(model, tokenizer, options)
    own = Serving.new(model, tokenizer, Keyword.delete(options, :defn_options))

    for input <- [
          @prompt,
          %{text: @prompt, seed: 5, temperature: 0.9},
          %{messages: [%{role: "user", content: "Write a post about tea"}]},
          [
            "Write a post about rain",
            %{text: @prompt, adapter: Bombus.load_adapter!({:demo, "pirate"})}
          ]
        ] do
      assert Fixtures.plain(Nx.Serving.run(nx, input)) == Fixtures.plain(Serving.run(own, input))
    end

    assert %{results: [%{text: _, token_summary: %{input: _, output: _, padding: 0}}]} =
             Nx.Serving.run(nx, @prompt)

    assert_raise ArgumentError, ~r/unknown option/, fn ->
      Nx.Serving.run(nx, %{text: "a", sede: 1})
    end
  end

  test "it streams", %{model: model, tokenizer: tokenizer} do
    serving =
      Text.generation(model, tokenizer, stream: true, stream_done: true, max_new_tokens: 20)

    own = Serving.new(model, tokenizer, max_new_tokens: 20)
    {pieces, [done: result]} = serving |> Nx.Serving.run(@prompt) |> Enum.split(-1)
    assert Fixtures.plain(result) == Fixtures.plain(Serving.run(own, @prompt))
    assert Enum.join(pieces) == hd(result.results).text
  end

  test "embeddings have Bumblebee's shape", %{model: model, tokenizer: tokenizer} do
    options = [pooling: :mean, dimensions: 24]
    bumblebee = [compile: [batch_size: 4, sequence_length: 200], defn_options: [compiler: EXLA]]
    serving = Text.text_embedding(model, tokenizer, options ++ bumblebee)
    {:ok, own} = Bombus.embed(model, tokenizer, ["tea", "rain"], options)
    own = for vector <- own, do: %{embedding: Bombus.Tensor.to_nx(vector)}
    assert Nx.Serving.run(serving, "tea") == hd(own)
    assert Nx.Serving.run(serving, ["tea"]) == [hd(own)]
    start_supervised!({Nx.Serving, serving: serving, name: NxEmbeddings})
    assert Nx.Serving.batched_run(NxEmbeddings, ["tea", "rain"]) == own
    assert Nx.Serving.batched_run(NxEmbeddings, []) == []
    long = String.duplicate("coffee ", 3000)
    assert {:error, %Error{reason: :prompt_too_long}} = Nx.Serving.batched_run(NxEmbeddings, long)
    assert_raise ArgumentError, ~r/strings/, fn -> Nx.Serving.run(serving, nil) end

    assert_raise ArgumentError, ~r/1..192/, fn ->
      Text.text_embedding(model, tokenizer, dimensions: 500)
    end
  end

  test "many callers in a supervision tree share the engine's batch", context do
    {serving, input} = endless()
    start_supervised!({Nx.Serving, serving: serving, name: NxMany})
    tasks = for _ <- 1..8, do: Task.async(fn -> Nx.Serving.batched_run(NxMany, input) end)
    assert_soon(fn -> Bombus.memory_info().sequences == 8 end)

    assert tasks |> Task.await_many() |> Enum.map(&Fixtures.plain/1) |> Enum.uniq() |> length() ==
             1

    started =
      {Nx.Serving,
       serving: Text.generation(context.model, context.tokenizer),
       name: NxText,
       batch_size: 4,
       batch_timeout: 10}

    start_supervised!(started)
    assert %{results: [%{text: text}]} = Nx.Serving.batched_run(NxText, @prompt)
    assert text =~ ~r/coffee/i
    long = %{text: String.duplicate("coffee ", 3000)}
    assert {:error, %Error{reason: :prompt_too_long}} = Nx.Serving.batched_run(NxText, long)
  end

  test "a stream that is halted and a client that dies are cancelled" do
    {serving, input} = endless(stream: true)
    start_supervised!({Nx.Serving, serving: serving, name: NxHalted})
    assert [_, _, _] = NxHalted |> Nx.Serving.batched_run(input) |> Enum.take(3)
    assert free?()

    again = fn ->
      Enum.each(1..1000, fn _ -> NxHalted |> Nx.Serving.batched_run(input) |> Stream.run() end)
    end

    client = spawn(again)
    assert_soon(fn -> Bombus.memory_info().sequences == 1 end)
    Process.exit(client, :kill)
    assert_soon(&free?/0)
  end

  describe "from another node" do
    setup do
      on_exit(fn -> Node.stop() end)
      # With nothing but Nx.
      {peer, node} =
        Fixtures.start_peer(Enum.reject(:code.get_path(), &(to_string(&1) =~ "bombus")))

      {:ok, _} = :erpc.call(node, Application, :ensure_all_started, [:nx])
      %{peer: peer, node: node}
    end

    test "it answers, streams, and cancels for a client that dies", %{node: node, peer: peer} do
      {serving, input} = endless()
      start_supervised!({Nx.Serving, serving: serving, name: NxFar})
      {streaming, _input} = endless(stream: true)
      start_supervised!({Nx.Serving, serving: streaming, name: NxFarStream})
      here = Nx.Serving.batched_run(NxFar, input)
      assert_soon(fn -> :erpc.call(node, :pg, :get_members, [Nx.Serving.PG, NxFar]) != [] end)
      there = :erpc.call(node, Nx.Serving, :batched_run, [NxFar, input])
      assert Fixtures.plain(there) == Fixtures.plain(here)
      assert :erpc.call(node, :code, :which, [Bombus]) == :non_existing

      code = "NxFarStream |> Nx.Serving.batched_run(input) |> Enum.to_list()"
      {streamed, _} = :erpc.call(node, Code, :eval_string, [code, [input: input]])
      assert [%{token_ids: ^streamed}] = here.results

      client = Node.spawn(node, Nx.Serving, :batched_run, [NxFar, List.duplicate(input, 60)])
      assert_soon(fn -> Bombus.memory_info().sequences > 50 end)
      Process.exit(client, :kill)
      # Long before all of them would have ended by themselves.
      assert_soon(&free?/0)
      :peer.stop(peer)
    end
  end
end
