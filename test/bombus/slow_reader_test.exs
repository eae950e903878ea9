defmodule Bombus.SlowReaderTest do
  # A stream whose reader is slower than the model.
  use ExUnit.Case, async: true

  alias Bombus.{Fixtures, Serving}

  @window 64

  setup_all do
    model =
      Bombus.load_model!(Fixtures.checkpoint("f32-untied"), device: :cpu, max_batch_size: 1)

    %{serving: Serving.new(model, nil)}
  end

  defp input(tokens), do: %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: tokens}

  defp mailbox, do: Process.info(self(), :message_queue_len) |> elem(1)

  test "leaves a bounded number of chunks unread, and its place to others", %{serving: serving} do
    %{results: [expected]} = Serving.run(serving, input(500))

    ids =
      serving
      |> Serving.stream(input(500))
      |> Enum.reduce([], fn id, ids ->
        if ids == [] do
          # The model may run on for as long as it likes.
          Process.sleep(300)
          assert mailbox() <= @window

          # The only place in the batch is free.
          other = Task.async(fn -> Serving.run(serving, input(20)) end)
          assert %{results: [%{finish_reason: :length}]} = Task.await(other, 10_000)
        end

        [id | ids]
      end)

    assert Enum.reverse(ids) == expected.token_ids
  end

  test "gets the result at the end as well", %{serving: serving} do
    input = Map.merge(input(300), %{stream_done: true, logprobs: 1})
    %{results: [expected]} = Serving.run(serving, Map.delete(input, :stream_done))

    {[{:done, %{results: [result]}}], ids} =
      serving
      |> Serving.stream(input)
      |> Stream.each(fn _element -> Process.sleep(1) end)
      |> Enum.split_with(&match?({:done, _result}, &1))

    assert ids == expected.token_ids
    assert result.token_ids == expected.token_ids
    assert length(result.logprobs) == 300
    assert Enum.map(result.logprobs, & &1.token_id) == expected.token_ids
  end

  test "joins text to longer chunks, and loses none" do
    model = Bombus.load_model!(:demo, device: :cpu)
    serving = Serving.new(model, Bombus.load_tokenizer!(:demo), max_new_tokens: 300)
    input = %{text: "Write a post about coffee", min_new_tokens: 250}
    %{results: [%{text: text}]} = Serving.run(serving, input)

    chunks =
      serving
      |> Serving.stream(input)
      |> Stream.with_index(fn chunk, index ->
        if index == 0, do: fall_behind(serving)
        chunk
      end)
      |> Enum.to_list()

    assert Enum.join(chunks) == text
    assert length(chunks) < 250
  end

  # Until the window is full, and for as many steps more as fill the chunk behind it.
  defp fall_behind(serving) do
    if mailbox() < @window do
      Process.sleep(1)
      fall_behind(serving)
    else
      other = %{token_ids: [3, 1, 4], min_new_tokens: 100, max_new_tokens: 100}
      Task.await(Task.async(fn -> Serving.run(serving, other) end), 30_000)
    end
  end
end
