defmodule Bombus.TelemetryTest do
  use ExUnit.Case

  alias Bombus.{Error, Fixtures, Serving}

  @events [
    [:bombus, :generation, :start],
    [:bombus, :generation, :stop],
    [:bombus, :generation, :exception],
    [:bombus, :engine, :step],
    [:bombus, :load, :start],
    [:bombus, :load, :stop],
    [:bombus, :load, :exception]
  ]

  setup do
    :telemetry.attach_many("test", @events, &__MODULE__.hear/4, self())
    on_exit(fn -> :telemetry.detach("test") end)
  end

  def hear([:bombus | event], measurements, metadata, test) do
    send(test, {event, measurements, metadata})
  end

  defp serving(options \\ []) do
    folder = Fixtures.checkpoint("f32-untied")
    Serving.new(Bombus.load_model!(folder, options), nil, max_new_tokens: 7)
  end

  test "a generation begins and stops" do
    serving = serving()
    %{results: [%{token_ids: ids}]} = Serving.run(serving, %{token_ids: [3, 1, 4, 1, 5]})
    assert length(ids) == 7
    assert_received {[:generation, :start], %{system_time: _, monotonic_time: _}, metadata}
    assert metadata.model == Fixtures.checkpoint("f32-untied")
    assert %{serving: nil, adapter: nil, request: request} = metadata
    assert_received {[:generation, :stop], measured, %{request: ^request, finish_reason: :length}}
    assert %{input_tokens: 5, cached_tokens: 0, output_tokens: 7} = measured
    assert measured.queue_time <= measured.time_to_first_token
    assert measured.time_to_first_token <= measured.duration
    assert measured.tokens_per_second > 0
    Serving.run(serving, %{token_ids: [3, 1, 4, 1, 5]})
    assert_received {[:generation, :stop], %{cached_tokens: 4}, _metadata}
  end

  test "a stream that is halted stops as cancelled" do
    serving = serving()
    input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}
    assert [_, _] = serving |> Serving.stream(input) |> Enum.take(2)
    assert_received {[:generation, :stop], %{output_tokens: output}, %{finish_reason: :cancelled}}
    assert output >= 2
    refute_received {[:generation, :stop], _, _}
  end

  test "what fails, and what is refused, is an exception" do
    serving = serving(max_context: 10)
    assert {:error, error} = Serving.run(serving, %{token_ids: Enum.to_list(1..11)})
    assert_received {[:generation, :start], _, %{request: request}}

    assert_received {[:generation, :exception], %{duration: _},
                     %{request: ^request, kind: :error, reason: ^error, stacktrace: []}}

    refute_received {[:generation, :stop], _, _}
  end

  test "an input of a list that waits for its turn begins once" do
    inputs = for n <- 1..9, do: %{token_ids: [n], max_new_tokens: 2}
    results = Serving.run(serving(max_batch_size: 2, max_queue: 1), inputs)
    assert Enum.all?(results, &match?(%{results: [_]}, &1))
    for _ <- inputs, do: assert_received({[:generation, :start], _, _})
    for _ <- inputs, do: assert_received({[:generation, :stop], _, _})
    refute_received {[:generation, _], _, _}
  end

  test "the name of the serving is told" do
    start_supervised!({Serving, serving: serving(), name: Told})
    Serving.batched_run(Told, %{token_ids: [1, 2]})
    assert_received {[:generation, :stop], _, %{serving: Told}}
  end

  test "the engine's steps are told" do
    Serving.run(serving(prefill_chunk: 4), %{token_ids: Enum.to_list(1..10)})
    steps = for _ <- 1..9, do: assert_receive({[:engine, :step], _, _})
    rows = for {_, %{rows: rows}, _} <- steps, do: rows
    assert rows == [4, 4, 2, 1, 1, 1, 1, 1, 1]

    for {_, measured, metadata} <- steps do
      assert %{batch_size: 1, queue: 0, kv_bytes: kv, prefix_cache_bytes: kept} = measured
      assert measured.duration > 0 and kv + kept > 0
      assert metadata == %{model: Fixtures.checkpoint("f32-untied"), device: :cpu}
    end
  end

  test "loading is told, with what went wrong, and no token" do
    Bombus.load_tokenizer!(:demo)
    assert_received {[:load, :start], _, %{kind: :tokenizer, source: "demo"}}
    assert_received {[:load, :stop], %{duration: _}, %{kind: :tokenizer, source: "demo"}}
    {:error, error} = Bombus.load_model("/nowhere")
    assert_received {[:load, :exception], %{duration: _}, %{kind: :model, error: ^error}}

    {:error, %Error{}} =
      Bombus.load_adapter({:hf, "owner/name", auth_token: "secret", offline: true})

    assert_received {[:load, :exception], _, %{kind: :adapter, source: "owner/name"} = metadata}
    refute inspect(metadata) =~ "secret"
  end
end
