defmodule Bombus.DemoModelTest do
  # The shipped model speaks: right sentences on the topic, greedy and sampled, in each voice.
  use ExUnit.Case, async: true

  alias Bombus.Serving

  # The generator's own source: the topics and all that the corpus can say about each.
  @source Path.expand("../../scripts/demo_model/topics.py", __DIR__)

  setup_all do
    model = Bombus.load_model!(:demo)
    serving = Serving.new(model, Bombus.load_tokenizer!(:demo), max_new_tokens: 120)
    %{serving: serving, topics: topics()}
  end

  # topic => its sentences. Facts are written as clauses, without capital and full stop.
  defp topics do
    sections = Regex.scan(~r/^    "([^"]+)": \{$(.*?)^    \},$/ms, File.read!(@source))

    for [_section, topic, body] <- sections, into: %{} do
      strings = for [_quoted, text] <- Regex.scan(~r/"((?:[^"\\]|\\.)*)"/, body), do: text
      {topic, MapSet.new(strings ++ Enum.map(strings, &(capital(&1) <> ".")))}
    end
  end

  defp capital(<<first::utf8, rest::binary>>), do: String.upcase(<<first::utf8>>) <> rest
  defp capital(""), do: ""

  defp write(serving, topic, options \\ %{}) do
    input = Map.merge(%{text: "Write a post about #{topic}"}, options)
    %{results: [%{text: text, finish_reason: :stop}]} = Serving.run!(serving, input)
    text
  end

  defp assert_correct(text, sentences) do
    for sentence <- Regex.split(~r/(?<=[.!?]) /, text) do
      assert sentence in sentences, "not a sentence of the topic: #{inspect(sentence)}"
    end
  end

  test "greedy, it writes correct sentences about every topic", %{topics: topics} = context do
    assert map_size(topics) >= 20
    assert Map.has_key?(topics, "coffee")

    inputs = for {topic, _sentences} <- topics, do: "Write a post about #{topic}"
    results = Serving.run!(context.serving, inputs)

    for {{_topic, sentences}, %{results: [result]}} <- Enum.zip(topics, results) do
      assert result.finish_reason == :stop
      assert_correct(result.text, sentences)
    end
  end

  test "sampled, ten seeds give several wordings, all of them correct", context do
    inputs =
      for seed <- 0..9, do: %{text: "Write a post about coffee", temperature: 0.8, seed: seed}

    texts =
      for %{results: [%{text: text}]} <- Serving.run!(context.serving, inputs), do: text

    Enum.each(texts, &assert_correct(&1, context.topics["coffee"]))
    assert texts |> Enum.uniq() |> length() >= 3
  end

  test "each adapter changes the voice and keeps to the topic", %{serving: serving} do
    for {name, voice} <- [{"pirate", ~r/\A(Ahoy|Arr)/}, {"news", ~r/\A[A-Z ]+[:!]/}] do
      adapter = Bombus.load_adapter!({:demo, name})
      text = write(serving, "coffee", %{adapter: adapter})
      assert text =~ voice
      assert text =~ ~r/coffee/i
      assert text =~ ~r/[.!?]\z/
    end

    refute write(serving, "coffee") =~ ~r/\A(Ahoy|Arr|[A-Z ]{4,})/
  end

  test "an unknown demo adapter is named, with those that there are" do
    assert {:error, %Bombus.Error{reason: :not_found} = error} =
             Bombus.load_adapter({:demo, "poet"})

    assert error.message =~ ~s("poet")
    assert error.message =~ ~s("pirate")
  end
end
